"""What a real vLLM engine tells of its steps."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from protos.scores import Sampling, ScoreSpec, Sequence
from teacher_server.backends import steps
from teacher_server.backends.steps import Step
from tests.teacher_server.backends.helpers import ids_of
from tests.teacher_server.backends.vllm.conftest import Run

pytestmark = pytest.mark.vllm


def test_steps_and_the_time_of_reading_out_are_told(engine: Callable[[str], Any], run: Run) -> None:
    backend, told = engine("qwen3"), list[Step]()
    meter = backend._engine.meter
    before, meter.observer = meter.observer, told.append
    lengths = [20, 30, 300]  # the last one takes two steps

    async def score(length: int) -> list[Step]:
        noted = steps.noting()
        await backend.score(Sequence(ids_of(np.random.default_rng(length), length, 261)), ScoreSpec(4))
        return noted

    async def everything() -> list[list[Step]]:
        await backend._engine.call("teacher_readout_s")
        noted = await asyncio.gather(*map(score, lengths))
        prompt = np.arange(5, dtype=np.int32)
        sampling = Sampling(6, temperature=0.0, ignore_eos=True)
        async for _ in backend.generate(prompt, sampling, n=1, logprobs=False, stream=True, mode=None):
            pass
        return noted

    try:
        noted = run(everything())
    finally:
        meter.observer = before
    scored = [step for step in told if step.kind == "score"]
    assert sum(step.tokens for step in scored) == sum(lengths)
    assert sum(step.sequences for step in scored) == len(lengths)
    assert all(step.seconds for step in told)
    for length, (step,) in zip(lengths, noted, strict=True):
        assert step in scored
        assert step.tokens >= length
    assert sum(step.tokens for step in told if step.kind == "generate") == 6
    (spent,) = run(backend._engine.call("teacher_readout_s"))
    assert 0 < spent < 60
    assert run(backend._engine.call("teacher_readout_s")) == [0.0]
