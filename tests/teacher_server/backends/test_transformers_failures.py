"""What happens when something goes wrong in a batch, a caller goes away, or the engine dies."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protos.errors import TeacherFailed, Unavailable, Unsupported
from protos.scores import Sampling, ScoreSpec, Sequence
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.scorer import Scorer
from teacher_server.backends.transformers_backend import TransformersBackend
from tests.teacher_server.backends.helpers import complete, ids_of

RNG = np.random.default_rng(11)
SPEC = ScoreSpec(top_k=4)


@pytest.fixture
def own(saved: Callable[[str], Path]) -> Iterator[TransformersBackend]:
    """A backend that the test may break."""
    backend = TransformersBackend(BackendOptions(model=str(saved("qwen3")), device="cpu", batch_tokens=512))
    asyncio.run(backend.start())
    yield backend
    asyncio.run(backend.close())


def burst(count: int, length: int = 20) -> list[Sequence]:
    return [Sequence(ids_of(RNG, length, 200)) for _ in range(count)]


def fail_in_forward(monkeypatch: pytest.MonkeyPatch, when: Callable[[list[Any]], BaseException | None]) -> list[int]:
    """Makes the scorer's forward raise; returns the sizes of the batches that it was asked for."""
    real, sizes = Scorer._forward, []

    def forward(self: Scorer, jobs: list[Any]) -> Any:
        sizes.append(len(jobs))
        error = when(jobs)
        if error is not None:
            raise error
        return real(self, jobs)

    monkeypatch.setattr(Scorer, "_forward", forward)
    return sizes


def test_a_non_finite_result_fails_its_own_sequence_alone(saved: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.teacher_server.backends.conftest import save_tokenizer

    model = AutoModelForCausalLM.from_pretrained(saved("qwen3"))
    with torch.no_grad():
        model.get_input_embeddings().weight[240] = torch.nan
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    backend = TransformersBackend(BackendOptions(model=str(tmp_path), device="cpu"))
    sequences = burst(20)
    sequences[7] = Sequence(np.array([1, 2, 240, 3, 4], dtype=np.int32))
    sequences[8] = Sequence(np.array([1, 2, 3, 4, 240], dtype=np.int32))

    async def run() -> list[Any]:
        await backend.start()
        results = await asyncio.gather(*(backend.score(s, SPEC) for s in sequences), return_exceptions=True)
        good = await complete(backend, ids_of(RNG, 5, 200), max_tokens=3, seed=1)
        with pytest.raises(TeacherFailed):
            await complete(backend, sequences[7].token_ids, max_tokens=3)
        assert await backend.healthy()
        await backend.close()
        return [*results, good]

    results = asyncio.run(run())
    assert isinstance(results[7], TeacherFailed)
    assert [i for i, r in enumerate(results) if isinstance(r, Exception)] == [7]


def test_an_engine_that_fails_one_sequence_runs_the_others_in_halves(
    own: TransformersBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bad = Sequence(np.array([250, 250, 250], dtype=np.int32))
    sizes = fail_in_forward(
        monkeypatch, lambda jobs: RuntimeError("shape") if any(j.sequence is bad for j in jobs) else None
    )
    sequences = [*burst(9, 3), bad]

    async def run() -> list[Any]:
        return await asyncio.gather(*(own.score(s, SPEC) for s in sequences), return_exceptions=True)

    results = asyncio.run(run())
    assert isinstance(results[-1], TeacherFailed)
    assert not any(isinstance(r, Exception) for r in results[:-1])
    assert sizes[0] == 10
    assert "shape" in caplog.text


def test_out_of_memory_is_answered_with_smaller_batches(
    own: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = fail_in_forward(monkeypatch, lambda jobs: torch.OutOfMemoryError("full") if len(jobs) > 3 else None)

    async def run() -> list[Any]:
        return await asyncio.gather(*(own.score(s, SPEC) for s in burst(10)))

    assert len(asyncio.run(run())) == 10
    assert max(sizes) == 10


def test_out_of_memory_while_generating_restarts_rows_with_the_same_tokens(
    own: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teacher_server.backends.sampling_loop import SamplingLoop

    prompts = [ids_of(RNG, 6, 200) for _ in range(6)]

    async def run() -> list[list[list[int]]]:
        made = await asyncio.gather(*(complete(own, p, max_tokens=8, seed=4, ignore_eos=True) for p in prompts))
        return [m.tokens for m in made]

    before = asyncio.run(run())
    real, steps = SamplingLoop._run, [0]

    def full(self: SamplingLoop, *arguments: Any) -> Any:
        steps[0] += 1
        if steps[0] == 4:
            raise torch.OutOfMemoryError("full")
        return real(self, *arguments)

    monkeypatch.setattr(SamplingLoop, "_run", full)
    assert asyncio.run(run()) == before


def test_a_crash_of_the_engine_is_told_to_everybody_and_makes_it_unhealthy(
    own: TransformersBackend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    fail_in_forward(monkeypatch, lambda _: torch.AcceleratorError("device lost"))

    async def run() -> list[Any]:
        work = [*(own.score(s, SPEC) for s in burst(60)), complete(own, ids_of(RNG, 4), max_tokens=500)]
        results = await asyncio.gather(*work, return_exceptions=True)
        assert not await own.healthy()
        with pytest.raises(Unavailable):
            await own.score(burst(1)[0], SPEC)
        return results

    assert all(isinstance(r, Unavailable) and r.retry_after_s for r in asyncio.run(run()))
    assert "device lost" in caplog.text


def test_closing_fails_what_is_in_flight_with_unavailable(own: TransformersBackend) -> None:
    async def run() -> None:
        long = asyncio.create_task(complete(own, ids_of(RNG, 4, 200), max_tokens=900, ignore_eos=True))
        await asyncio.sleep(0.2)
        await own.close()
        with pytest.raises(Unavailable):
            await long
        with pytest.raises(Unavailable):
            await own.score(burst(1)[0], SPEC)

    asyncio.run(run())


def test_a_cancelled_score_is_dropped_before_its_batch(
    own: TransformersBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = fail_in_forward(monkeypatch, lambda _: None)

    async def run() -> None:
        kept, dropped = burst(40, 60), burst(40, 60)
        tasks = [asyncio.create_task(own.score(s, SPEC)) for s in dropped]
        rest = [asyncio.create_task(own.score(s, SPEC)) for s in kept]
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*rest)
        assert all(t.cancelled() for t in (await asyncio.wait(tasks))[0])

    asyncio.run(run())
    assert sum(sizes) < 60, "cancelled sequences were still run"


def test_a_cancelled_generation_leaves_the_batch(own: TransformersBackend) -> None:
    async def run() -> None:
        stream: AsyncIterator[Any] = own.generate(
            ids_of(RNG, 4, 200), Sampling(900, ignore_eos=True), n=4, logprobs=False, stream=True, mode=None
        )
        async for _ in stream:
            break
        await stream.aclose()  # type: ignore[attr-defined]
        await complete(own, ids_of(RNG, 4, 200), max_tokens=4)

    asyncio.run(run())


def test_a_think_budget_without_think_tokens_is_refused(own: TransformersBackend) -> None:
    own._tags = None
    with pytest.raises(Unsupported, match="max_thinking_tokens"):
        asyncio.run(complete(own, ids_of(RNG, 4), max_tokens=4, max_thinking_tokens=2))
