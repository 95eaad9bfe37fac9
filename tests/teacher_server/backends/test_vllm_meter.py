"""What is told of an engine's steps from its outputs, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from teacher_server.backends import steps, vllm_meter
from teacher_server.backends.steps import Step
from teacher_server.backends.vllm_meter import Meter


def output(name: str, new: int = 1) -> Any:
    return SimpleNamespace(request_id=name, new_token_ids=[0] * new)


def test_steps_have_their_kind_size_and_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(vllm_meter.time, "time", lambda: clock.now)
    meter, told = Meter(), []
    meter.observer = told.append
    clock.now = 150.0  # a pause does not count
    noted = steps.noting()
    with meter.scoring("1", 30), meter.scoring("2", 10), meter.generating():
        clock.now = 152.0
        meter.arrived([output("1-abcdef01"), output("3", 40)])
        clock.now = 153.0
        meter.arrived([output("2")])
        meter.arrived([])
    first, other, second = told
    assert [(s.kind, s.sequences, s.tokens) for s in told] == [("score", 1, 30), ("generate", 1, 40), ("score", 1, 10)]
    assert (first.began, other.began + (other.seconds or 0)) == (150.0, pytest.approx(152.0))
    assert (first.seconds or 0) + (other.seconds or 0) == pytest.approx(2.0)
    assert (second.began, second.seconds) == (152.0, 1.0)
    assert set(noted) == {first, second}


def test_seconds_of_reading_out_go_to_the_next_step_that_scores() -> None:
    meter = Meter()
    told: list[Step] = []
    meter.observer = told.append
    meter.readout_s = 0.5
    meter.arrived([output("9")])
    with meter.scoring("1", 3):
        meter.arrived([output("1")])
        meter.arrived([output("1")])
    assert [step.readout_s for step in told] == [0.0, 0.5, 0.0]
    assert meter.scored
