"""OpenTelemetry from a trainer's step to the engine's batch, and nothing of it where it is not configured."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from protos.errors import TeacherError
from protos.scores import Prompt, Sampling, ScoreSpec, Sequence
from student_trainer.teacher_client import connect
from student_trainer.traces import OtelTracer, StepSpans
from teacher_server.app import App, StartError
from teacher_server.auth import Caller
from teacher_server.backends.steps import Step
from teacher_server.backends.theoretical_backend import Behaviour
from teacher_server.config import ServerConfig
from teacher_server.exchange import Exchange
from teacher_server.otel_traces import OtelTraces
from teacher_server.traces import CallTrace, Part
from tests.collector import Collector, Span, collecting
from tests.servers import ROOT, environment, process, serving, theory, wait_for

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-"


def ids(*tokens: int) -> Sequence:
    return Sequence(np.array(tokens, dtype=np.int32))


def ended(parent: str, trace: CallTrace, outcome: str = "OK", ratio: float = 1.0) -> dict[str, list[Any]]:
    """The spans of a call that began at second 10, by name."""
    exporter = InMemorySpanExporter()
    traces = OtelTraces("http://127.0.0.1:1", ratio, SimpleSpanProcessor(exporter))
    caller = Caller("me", "grpc", exchange=Exchange("the-id", parent, began=10.0))
    traces.ended("score", caller, outcome, trace)
    traces.close()
    found: dict[str, list[Any]] = {}
    for span in exporter.get_finished_spans():
        found.setdefault(span.name, []).append(span)
    return found


def test_a_call_is_a_span_of_its_callers_trace_with_one_below_for_each_batch() -> None:
    first, second = Step("score", 8, 900, 12.0, 1.0, 0.25), Step("score", 2, 50, 13.0)
    parts = [Part(11.0, 12.0, 13.0, "the-id", 100, first) for _ in range(3)]
    parts += [Part(11.5, 12.5, 14.0, "another", 40, second)]
    found = ended(PARENT + "01", CallTrace(5, 350, 1, parts))
    (call,), (queue,), batches = found["teacher score"], found["queue"], found["engine batch"]
    assert call.kind is SpanKind.SERVER
    assert f"{call.parent.trace_id:032x}-{call.parent.span_id:016x}" == PARENT[3:-1]
    assert call.start_time == 10_000_000_000
    assert dict(call.attributes) == {
        **{"client": "me", "transport": "grpc", "request.id": "the-id", "outcome": "OK"},
        **{"sequences": 5, "sequences.known": 1, "tokens": 350},
    }
    assert (queue.start_time, queue.end_time) == (11_000_000_000, 12_500_000_000)
    assert [(b.start_time / 1e9, b.end_time / 1e9) for b in batches] == [(12.0, 13.0), (13.0, 14.0)]
    assert [(b.attributes["batch.sequences"], b.attributes["sequences"]) for b in batches] == [(8, 3), (2, 1)]
    assert [b.attributes.get("computed.for") for b in batches] == [None, ("another",)]
    for span in (queue, *batches):
        assert span.parent.span_id == call.context.span_id


def test_a_call_that_failed_says_with_what() -> None:
    (call,) = ended("", CallTrace(), "OVERLOADED")["teacher score"]
    assert (call.status.status_code, call.status.description) == (StatusCode.ERROR, "OVERLOADED")
    assert call.parent is None


@pytest.mark.parametrize(
    ("parent", "ratio", "spans"),
    [(PARENT + "00", 1.0, 0), (PARENT + "01", 0.0, 1), ("", 0.0, 0), ("nonsense", 1.0, 1), ("", 1.0, 1)],
)
def test_the_callers_decision_counts_and_without_one_the_ratio(parent: str, ratio: float, spans: int) -> None:
    assert len(ended(parent, CallTrace(), ratio=ratio).get("teacher score", [])) == spans


def below(collector: Collector, parent: Span) -> list[Span]:
    return [span for span in collector.spans if span.parent == parent.id]


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_one_trace_leads_from_a_step_to_the_engines_batch(transport: str) -> None:
    with collecting() as collector:
        tracer = OtelTracer(collector.endpoint, "run")
        steps = StepSpans(tracer, "policy")
        with (
            serving(theory(Behaviour(failing_id=255)), traces={"endpoint": collector.endpoint}) as server,
            connect(getattr(server, transport), name="trainer", tracer=tracer) as client,
        ):
            state = SimpleNamespace(global_step=0, max_steps=2)
            steps.on_train_begin(None, state, None)
            client.score([ids(1, 2, 3), ids(4, 5)], ScoreSpec(4))
            elsewhere = threading.Thread(target=lambda: client.generate([Prompt(token_ids=(1, 2))], Sampling(4)))
            elsewhere.start()
            elsewhere.join()
            state.global_step = 1
            steps.on_step_end(None, state, None)
            with pytest.raises(TeacherError):
                client.score([ids(1, 255)])
            state.global_step = 2
            steps.on_step_end(None, state, None)
            client.score([ids(1, 2, 3)], ScoreSpec(4))
        tracer.close()
    assert {span.service for span in collector.spans} == {"strong2weak-trainer", "strong2weak-teacher"}
    first, second = sorted(collector.named("step"), key=lambda span: span.began)
    told = [(span.about["step"], span.about["stage"], span.parent) for span in (first, second)]
    assert told == [(1, "policy", ""), (2, "policy", "")]
    score, generate = below(collector, first)
    assert [(s.name, s.kind, s.trace == first.trace) for s in (score, generate)] == [
        ("teacher.score", "CLIENT", True),
        ("teacher.generate", "CLIENT", True),
    ]
    (served,) = below(collector, score)
    assert (served.name, served.kind, served.trace) == ("teacher score", "SERVER", first.trace)
    assert (served.about["client"], served.about["transport"], served.about["sequences"]) == ("trainer", transport, 2)
    inside = below(collector, served)
    assert sorted(span.name for span in inside) == ["engine batch", "engine batch", "queue"]
    assert sorted(span.about["batch.tokens"] for span in inside if span.name == "engine batch") == [2, 3]
    for span in (served, *inside):
        assert score.began - 0.1 <= span.began <= span.ended <= score.ended + 0.1
    (generated,) = below(collector, generate)
    assert sorted(span.name for span in below(collector, generated)) == ["engine", "queue"]
    (failed,) = below(collector, second)
    (refused,) = below(collector, failed)
    assert (refused.about["outcome"], refused.trace) == ("TEACHER_FAILED", second.trace)
    (after,) = [span for span in collector.named("teacher.score") if not span.parent]
    (known,) = below(collector, after)
    assert known.about["sequences.known"] == 1
    assert below(collector, known) == []


def test_spans_take_no_random_numbers_of_a_run() -> None:
    random.seed(0)
    before = random.getstate()
    tracer = OtelTracer("http://127.0.0.1:1", "run", SimpleSpanProcessor(InMemorySpanExporter()))
    tracer.begin_step("policy", 1)
    with tracer.span("teacher.score", {}):
        ended("", CallTrace())
    tracer.close()
    assert random.getstate() == before


def test_nothing_is_imported_where_nothing_is_configured() -> None:
    code = """
import sys
import numpy as np
from protos.scores import Sequence
from student_trainer.teacher_client import connect
from tests.servers import serving, theory
with serving(theory()) as server, connect(server.grpc) as client:
    client.score([Sequence(np.array([1, 2], dtype=np.int32))])
ours = ("opentelemetry.sdk", "opentelemetry.exporter", "teacher_server.otel_traces", "student_trainer.traces")
print([name for name in sys.modules if name.startswith(ours)])  # FastAPI imports the interface on its own account
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_a_server_without_opentelemetry_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "teacher_server.otel_traces", None)

    async def make() -> None:
        App(ServerConfig(model="x", traces={"endpoint": "http://127.0.0.1:1"}), theory())  # type: ignore[arg-type]

    with pytest.raises(StartError, match=r"pip install 'strong2weak\[otel\]'"):
        asyncio.run(make())


def test_a_collector_that_is_away_costs_no_call() -> None:
    with serving(theory(), traces={"endpoint": "http://127.0.0.1:9/v1/traces"}) as server:
        for _ in range(20):
            httpx.post(f"{server.http}/v1/score", json={"sequences": [[1, 2]]}, timeout=5).raise_for_status()


@pytest.mark.slow
def test_a_training_run_sends_its_steps_and_what_they_asked(tmp_path: Path) -> None:
    teacher = ("--model", str(ROOT / "tiny_pair" / "teacher"))
    with (
        collecting() as collector,
        process(tmp_path, *teacher, "--traces-endpoint", collector.endpoint) as (_, addresses),
    ):
        settings = {
            "training.traces_endpoint": collector.endpoint,
            "training.output_dir": tmp_path / "out",
            "training.log_file": tmp_path / "log.txt",
            "teacher.endpoint": addresses["grpc"],
            "policy_distillation.max_steps": 2,
            "data.max_examples": 12,
            "evaluation.problems": 2,
        }
        command = [sys.executable, "main_distillation.py", "--config", "config/demo.yaml", "--stage", "policy"]
        command += ["--pretrained_student", "tiny_pair/student_base", *(f"{k}={v}" for k, v in settings.items())]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        wait_for(lambda: len(collector.named("step")) == 2)
    steps = sorted(collector.named("step"), key=lambda span: span.began)
    assert [step.about["step"] for step in steps] == [1, 2]
    for before, after in itertools.pairwise(steps):
        assert before.ended <= after.began
    asked = [span for step in steps for span in below(collector, step)]
    served = [span for one in asked for span in below(collector, one) if span.service == "strong2weak-teacher"]
    batches = [span for one in served for span in below(collector, one) if span.name == "engine batch"]
    assert asked
    assert len(served) == len(asked)
    assert batches
    assert all(batch.about["batch.tokens"] >= batch.about["tokens"] > 0 for batch in batches)
