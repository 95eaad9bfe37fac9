"""A trainer's numbers for Prometheus, `GET /metrics` on a port of its own: rank 0's of a run, while the run lasts.

It is imported where `training.metrics_port` is set, because it needs prometheus-client. Knows what is counted and by
which names; meters.py knows when. The label `run` is the name of the run's folder, `stage` that of the stage's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack

import torch
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from protos.scores import TeacherInfo

from .errors import UserError
from .teacher_client.replicas import ReplicaStatus

CALL_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0)

ATTEMPTS = "trainer_teacher_attempts", "Attempts to call a server of a teacher."
FAILED = (
    "trainer_teacher_failed_attempts",
    "Attempts that failed: each was made again, or its call failed.",
)
UP = "trainer_teacher_up", "Whether a server of a teacher gets calls now (1) or is waited for, down or refused (0)."
OUTSTANDING = "trainer_teacher_outstanding_tokens", "Tokens that a server of a teacher is working on for this run."
BY_SERVER = ["run", "address"]
GPU = (
    "trainer_gpu_memory_bytes",
    "Memory of the process's GPU as torch sees it: allocated, reserved, and the most ever allocated (peak).",
)


class Metrics:
    """All metrics of one run in a registry of their own."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.registry = registry = CollectorRegistry()
        stage = ["run", "stage"]
        self.info = Gauge(
            "trainer_info",
            "1 for each teacher of the run.",
            ["run", "student", "teacher", "fingerprint"],
            registry=registry,
        )
        self.training = Gauge(
            "trainer_training", "Whether a stage trains now; 0 once it has ended.", stage, registry=registry
        )
        self.step = Gauge("trainer_step", "Optimizer steps done.", stage, registry=registry)
        self.steps = Gauge("trainer_steps", "Optimizer steps that the stage has in all.", stage, registry=registry)
        self.step_seconds = Gauge(
            "trainer_step_seconds", "Seconds of the last step; 0 until one is done.", stage, registry=registry
        )
        self.step_time = Gauge(
            "trainer_last_step_timestamp_seconds",
            "Unix time of the last step's end, or of the stage's begin.",
            stage,
            registry=registry,
        )
        self.value = Gauge(
            "trainer_value",
            "A number of the last line of metrics, a mean over its steps: loss, soft_loss, cross_entropy, forward_kl, "
            "reverse_kl, tail_share, importance_weight, grad_norm, learning_rate, padding_share, tokens_per_second.",
            [*stage, "name"],
            registry=registry,
        )
        self.measured = Gauge(
            "trainer_measured",
            "A number of the last measurement on held-out problems.",
            [*stage, "name"],
            registry=registry,
        )
        self.completion_tokens = Counter(
            "trainer_completion_tokens", "Completion tokens trained on, of all processes.", stage, registry=registry
        )
        self.seconds = Counter(
            "trainer_seconds",
            "Seconds of steps by part: sampling, teacher (waiting for scores), saving, training (the rest).",
            [*stage, "part"],
            registry=registry,
        )
        self.rollouts = Counter(
            "trainer_rollouts", "Completions that the student sampled.", ["run", "mode"], registry=registry
        )
        self.rollout_tokens = Counter("trainer_rollout_tokens", "Tokens of these.", ["run", "mode"], registry=registry)
        self.rollout_seconds = Counter(
            "trainer_rollout_seconds",
            "Seconds that sampling these took, the wait for the engine.",
            ["run"],
            registry=registry,
        )
        self.staleness = Gauge(
            "trainer_rollout_staleness_steps",
            "Steps by which the weights that sampled the last step's rollouts were older; those of a checkpoint count "
            "as policy_distillation.max_staleness.",
            ["run"],
            registry=registry,
        )
        self.calls = Counter(
            "trainer_teacher_calls",
            "Calls of teachers that ended, by method (score, generate) and outcome (OK, the error's reason, or OTHER).",
            ["run", "method", "outcome"],
            registry=registry,
        )
        self.call_seconds = Histogram(
            "trainer_teacher_call_seconds",
            "Seconds of these, with all their attempts and what was waited between them.",
            ["run", "method"],
            buckets=CALL_SECONDS,
            registry=registry,
        )
        self.scored_tokens = Counter(
            "trainer_teacher_scored_tokens", "Tokens of sequences that teachers scored.", ["run"], registry=registry
        )
        ProcessCollector(registry=registry)
        registry.register(_Gpu(run))

    def about(self, student: str, teachers: Iterable[TeacherInfo]) -> None:
        """Names the student and the teachers of the run."""
        for teacher in teachers:
            self.info.labels(self.run, student, teacher.name, teacher.fingerprint).set(1)

    def watch(self, replicas: Callable[[], Iterable[ReplicaStatus]]) -> None:
        """Shows how the servers of the teachers fare; `replicas` is asked at each scrape, in its thread."""
        self.registry.register(_Servers(self.run, replicas))


class _Servers(Collector):
    def __init__(self, run: str, replicas: Callable[[], Iterable[ReplicaStatus]]) -> None:
        self._run, self._replicas = run, replicas

    def collect(self) -> Iterator[Metric]:
        attempts, failed = (CounterMetricFamily(*about, labels=BY_SERVER) for about in (ATTEMPTS, FAILED))
        up, outstanding = (GaugeMetricFamily(*about, labels=BY_SERVER) for about in (UP, OUTSTANDING))
        for server in self._replicas():
            labels = [self._run, server.address]
            attempts.add_metric(labels, server.calls)
            failed.add_metric(labels, server.failed)
            up.add_metric(labels, server.state == "up")
            outstanding.add_metric(labels, server.outstanding_tokens)
        yield from (attempts, failed, up, outstanding)


class _Gpu(Collector):
    def __init__(self, run: str) -> None:
        self._run = run

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(*GPU, labels=["run", "kind"])
        if torch.cuda.is_initialized():
            for kind, read in (
                ("allocated", torch.cuda.memory_allocated),
                ("reserved", torch.cuda.memory_reserved),
                ("peak", torch.cuda.max_memory_allocated),
            ):
                family.add_metric([self._run, kind], read())
        yield family


def serve(metrics: Metrics, host: str, port: int, stack: ExitStack) -> None:
    """Serves `metrics` until `stack` is closed; UserError where the address cannot be had."""
    try:
        server, thread = start_http_server(port, host, metrics.registry)
    except OSError as error:
        raise UserError(
            f"metrics cannot be served at {host}:{port}: {error.strerror or error}",
            "training.metrics_port",
            "choose another port, one for each run on this machine, and a metrics_host of this machine",
        ) from error

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    stack.callback(close)


def describe_metrics() -> list[tuple[str, str, tuple[str, ...], str]]:
    """(name as Prometheus shows it, type, labels, meaning) of every metric, for the reference page."""
    found = []
    for metric in vars(Metrics("")).values():
        if isinstance(metric, (Counter, Gauge, Histogram)):
            (family,) = metric.describe()
            name = family.name + ("_total" if family.type == "counter" else "")
            found.append((name, family.type, tuple(metric._labelnames), family.documentation))
    found += [(f"{name}_total", "counter", tuple(BY_SERVER), text) for name, text in (ATTEMPTS, FAILED)]
    found += [(name, "gauge", tuple(BY_SERVER), text) for name, text in (UP, OUTSTANDING)]
    return [*found, (GPU[0], "gauge", ("run", "kind"), GPU[1])]
