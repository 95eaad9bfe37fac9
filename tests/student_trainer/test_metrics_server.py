"""A trainer's numbers as Prometheus reads them: of a real run, of calls that are repeated, of stages and rollouts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos import errors
from protos.scores import Mode, Sequence
from student_trainer import reporting
from student_trainer.config import Training
from student_trainer.errors import UserError
from student_trainer.meters import CallMeter, RolloutMeter, StageMeter
from student_trainer.metrics_server import Metrics, describe_metrics, serve
from student_trainer.teacher_client import connect
from student_trainer.teacher_client.tracing import NO_TRACER
from tests.servers import ROOT, environment
from tests.student_trainer.live import ScriptedTeacher, over_grpc

Numbers = dict[tuple[str, str], float]
"""(name, its labels but `run`, sorted, as "a=b c=d") -> value."""


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def scrape(port: int) -> Numbers:
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").raise_for_status().text
    found: Numbers = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = " ".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "run")
            found[sample.name, labels] = sample.value
    return found


def test_a_stage_counts_steps_one_by_one_and_the_rest_with_each_line_of_metrics() -> None:
    metrics, port = Metrics("mine"), free_port()
    with ExitStack() as stack:
        serve(metrics, "127.0.0.1", port, stack)
        meter = StageMeter(metrics, "policy")
        state = SimpleNamespace(global_step=4, max_steps=20)  # gone on from step 4
        began = time.time()
        meter.on_train_begin(None, state, None)
        assert scrape(port)["trainer_step_seconds", "stage=policy"] == 0
        for step in (5, 6):
            state.global_step = step
            meter.on_step_end(None, state, None)
        line = {"loss": 0.5, "reverse_kl": 0.25, "epoch": 1.0, "seconds_teacher": 2.0, "completion_tokens": 30.0}
        meter.on_log(None, state, None, line)
        meter.on_log(None, state, None, {"eval_accuracy_thinking": 0.75, "eval_sample_0": "text"})
        found = scrape(port)
        meter.close()
        ended = scrape(port)
    assert found["trainer_training", "stage=policy"] == 1
    assert (found["trainer_step", "stage=policy"], found["trainer_steps", "stage=policy"]) == (6, 20)
    assert began - 1 <= found["trainer_last_step_timestamp_seconds", "stage=policy"] <= time.time() + 1
    values = {labels: value for (name, labels), value in found.items() if name == "trainer_value"}
    assert values == {"name=loss stage=policy": 0.5, "name=reverse_kl stage=policy": 0.25}
    assert found["trainer_seconds_total", "part=teacher stage=policy"] == 4.0
    assert found["trainer_completion_tokens_total", "stage=policy"] == 60.0
    assert found["trainer_measured", "name=accuracy_thinking stage=policy"] == 0.75
    assert found["process_resident_memory_bytes", ""] > 1e6
    assert ended["trainer_training", "stage=policy"] == 0
    with pytest.raises(httpx.ConnectError):
        scrape(port)


def test_rollouts_are_as_old_as_the_steps_between_their_sampling_and_their_training() -> None:
    metrics = Metrics("mine")

    def age() -> Any:
        return metrics.registry.get_sample_value("trainer_rollout_staleness_steps", {"run": "mine"})

    meter = RolloutMeter(metrics)
    ages = []
    for step in (0, 1, 2):  # as the trainer calls it with max_staleness 1
        for announced in (0, 1) if step == 0 else (step + 1,):
            meter.announced(announced, restored=False)
        meter.taken(step, 1)
        ages.append(age())
    assert ages == [0, 1, 1]
    meter = RolloutMeter(metrics)  # gone on at step 5 with the rollouts of step 5 from a checkpoint
    meter.announced(5, restored=True)
    meter.announced(6, restored=False)
    meter.taken(5, 1)
    assert age() == 1
    meter.taken(6, 1)
    assert age() == 1
    meter.ended(Mode.THINKING, 12, 0.5)
    meter.ended(Mode.THINKING, 8, 0.25)
    labels = {"run": "mine", "mode": "thinking"}
    assert metrics.registry.get_sample_value("trainer_rollout_tokens_total", labels) == 20
    assert metrics.registry.get_sample_value("trainer_rollout_seconds_total", {"run": "mine"}) == 0.75


def test_calls_are_timed_with_their_retries_and_named_by_how_they_end() -> None:
    metrics, port = Metrics("mine"), free_port()
    teacher = ScriptedTeacher()
    with ExitStack() as stack:
        serve(metrics, "127.0.0.1", port, stack)
        address = stack.enter_context(over_grpc(teacher))
        client = stack.enter_context(connect(address, tracer=CallMeter(metrics, NO_TRACER)))
        metrics.watch(client.replicas)
        teacher.failures = [errors.Overloaded("full", retry_after_s=0.2)]
        client.score([Sequence(np.array([1, 2, 3], dtype=np.int32))])
        with pytest.raises(errors.InvalidSequence):
            client.score([Sequence(np.array([1, 5000], dtype=np.int32))])
        found = scrape(port)
    assert found["trainer_teacher_calls_total", "method=score outcome=OK"] == 1
    assert found["trainer_teacher_calls_total", "method=score outcome=INVALID_SEQUENCE"] == 1
    assert found["trainer_teacher_call_seconds_count", "method=score"] == 2
    assert found["trainer_teacher_call_seconds_sum", "method=score"] > 0.2
    assert found["trainer_teacher_scored_tokens_total", ""] == 3
    assert found["trainer_teacher_attempts_total", f"address={address}"] == 4  # the first asked who the teacher is
    assert found["trainer_teacher_failed_attempts_total", f"address={address}"] == 2
    assert found["trainer_teacher_up", f"address={address}"] == 1


def test_a_port_that_is_taken_is_said_with_what_to_do() -> None:
    with socket.socket() as taken, ExitStack() as stack:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"127.0.0.1:{port}: Address already in use; choose another port"):
            reporting.open_metrics(Training(metrics_port=port), stack)


def test_without_a_port_nothing_is_served_and_nothing_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "student_trainer.metrics_server")
    with ExitStack() as stack:
        assert reporting.open_metrics(Training(), stack) is None
        with pytest.raises(ImportError):
            reporting.open_metrics(Training(metrics_port=9400), stack)


def test_a_missing_package_is_said_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporting, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"prometheus-client is not installed; .*strong2weak\[metrics\]"):
        reporting.check_reports(Training(metrics_port=9400))


@pytest.mark.slow
def test_a_run_is_scraped_while_it_trains(pair_teacher: dict[str, Any], tmp_path: Path) -> None:
    port = free_port()
    settings = {
        "training.metrics_port": port,
        "training.output_dir": tmp_path / "mine",
        "training.log_file": tmp_path / "log.txt",
        "training.logging_steps": 1,
        "teacher.endpoint": pair_teacher["grpc"],
        "policy_distillation.max_steps": 4,
        "policy_distillation.max_staleness": 1,
        "data.max_examples": 12,
        "evaluation.problems": 2,
    }
    command = [sys.executable, "main_distillation.py", "--config", "config/demo.yaml", "--stage", "policy"]
    command += ["--pretrained_student", "tiny_pair/student_base", *(f"{k}={v}" for k, v in settings.items())]
    last: Numbers = {}
    with (tmp_path / "out").open("w+") as out:
        run = subprocess.Popen(command, cwd=ROOT, env=os.environ | environment(), stdout=out, stderr=out)
        while run.poll() is None:
            with suppress(httpx.TransportError):
                last = scrape(port)
            time.sleep(0.02)
        assert run.returncode == 0, (tmp_path / "out").read_text()[-3000:]
    assert (last["trainer_step", "stage=policy"], last["trainer_steps", "stage=policy"]) == (4, 4)
    for name in ("loss", "reverse_kl", "tail_share", "importance_weight", "learning_rate", "tokens_per_second"):
        assert f"name={name} stage=policy" in {labels for n, labels in last if n == "trainer_value"}
    parts = {labels for name, labels in last if name == "trainer_seconds_total"}
    assert parts == {f"part={part} stage=policy" for part in ("sampling", "teacher", "training", "saving")}
    trained = last["trainer_completion_tokens_total", "stage=policy"]
    sampled = sum(value for (name, _), value in last.items() if name == "trainer_rollout_tokens_total")
    assert sampled == trained > 0
    assert last["trainer_rollout_staleness_steps", ""] == 1
    assert last["trainer_teacher_calls_total", "method=score outcome=OK"] >= 4
    assert last["trainer_teacher_scored_tokens_total", ""] > trained
    exposed = {name.removesuffix("_bucket").removesuffix("_sum").removesuffix("_count") for name, _ in last}
    described = {name for name, *_ in describe_metrics()}
    assert described - exposed == {"trainer_gpu_memory_bytes"}
