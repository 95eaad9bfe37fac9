"""What is concluded of an engine's steps: where it is full, or that they do not say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from teacher_server.pace import GAIN, Pace


def told(tokens: np.ndarray, seconds: np.ndarray) -> Pace:
    pace = Pace()
    for x, y in zip(tokens, seconds, strict=True):
        pace.observe(int(x), float(y))
    return pace


def test_an_engine_of_set_speed_is_full_with_one_token() -> None:
    tokens = np.random.default_rng(0).integers(1, 9, 100)
    assert told(tokens, tokens / 2000).full == pytest.approx(1.0)


def test_an_engine_that_reads_its_weights_at_each_step_is_full_where_they_are_a_quarter_of_it() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 300, 2000)
    seconds = 0.02 + 0.0001 * tokens + rng.normal(0, 0.002, 2000)
    full = told(tokens, seconds).full
    assert full == pytest.approx(GAIN * 200, rel=0.15)


@pytest.mark.parametrize(
    ("tokens", "seconds"),
    [
        (np.full(100, 64), np.linspace(0.01, 0.02, 100)),
        (np.arange(1, 11), np.arange(1, 11) / 100),
        (np.random.default_rng(0).integers(1, 300, 500), np.random.default_rng(1).uniform(0.01, 0.02, 500)),
        (np.random.default_rng(0).integers(1, 300, 500), np.zeros(500)),
    ],
    ids=["all alike", "few", "unrelated", "no time at all"],
)
def test_steps_that_do_not_say_let_the_room_alone_decide(tokens: np.ndarray, seconds: np.ndarray) -> None:
    assert told(tokens, seconds).full == math.inf


def test_another_speed_is_learned() -> None:
    tokens = np.random.default_rng(0).integers(1, 300, 2000)
    pace = told(np.concatenate([tokens, tokens]), np.concatenate([tokens / 2000, 0.02 + tokens / 2000]))
    assert pace.full == pytest.approx(GAIN * 40, rel=0.1)
