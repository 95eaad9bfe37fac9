"""An engine that dies is started again, under any of its backends; what cannot be mended is given up in words."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protos.errors import TeacherFailed, Unavailable
from protos.scores import Sampling, ScoreSpec, Sequence
from teacher_server.backends.base import Backend
from teacher_server.backends.factory import make_backend
from teacher_server.backends.life import Patience
from teacher_server.backends.options import BackendOptions, RestartPolicy
from teacher_server.backends.supervisor import EngineState, Supervised
from teacher_server.backends.theoretical_backend import Behaviour, TheoreticalBackend
from tests.teacher_server.backends.helpers import complete, ids_of
from tests.teacher_server.backends.test_transformers_failures import fail_in_forward

OPTIONS = BackendOptions(model="theory", backend="theoretical")
CRASH, VANISH, FREEZE, FAIL, HANG = 240, 241, 242, 243, 244
DEADLY = Behaviour(crashing_id=CRASH, vanishing_id=VANISH, freezing_id=FREEZE, failing_id=FAIL, hanging_id=HANG)
FAST = RestartPolicy(backoff_s=0.0)
QUICK = Patience(look_s=0.02, answer_s=0.1, close_s=0.2)


class Bench:
    """A supervisor, the engines that it made, and the states that it went through."""

    def __init__(self, *behaviours: Behaviour, policy: RestartPolicy = FAST, patience: Patience = QUICK) -> None:
        self.engines: list[TheoreticalBackend] = []
        self.states: list[EngineState] = []
        self._behaviours = behaviours
        self._changed = asyncio.Event()
        self.supervised = Supervised(self._make, policy, self._on_state, patience)

    def _make(self) -> TheoreticalBackend:
        behaviour = self._behaviours[min(len(self.engines), len(self._behaviours) - 1)]
        self.engines.append(TheoreticalBackend(OPTIONS, behaviour))
        return self.engines[-1]

    def _on_state(self, state: EngineState) -> None:
        self.states.append(state)
        self._changed.set()

    async def until(self, state: EngineState, times: int = 1) -> None:
        """Waits until it has been in `state` so many times."""
        async with asyncio.timeout(60):
            while self.states.count(state) < times:
                self._changed.clear()
                await self._changed.wait()

    async def score(self, *ids: int) -> int:
        """Number of scored positions."""
        return (await self.supervised.score(Sequence(ids), ScoreSpec(1))).positions

    async def generate(self, *ids: int) -> int:
        """Number of new tokens."""
        pieces = self.supervised.generate(
            Sequence(ids).token_ids, Sampling(4, ignore_eos=True), n=1, logprobs=False, stream=True, mode=None
        )
        return sum([len(piece.token_ids) async for group in pieces for piece in group])


def on_a_bench(*behaviours: Behaviour, **options: Any) -> Callable[[Any], Callable[[], None]]:
    """Runs an async test with a started bench, and closes it."""

    def decorate(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        async def main() -> None:
            bench = Bench(*behaviours, **options)
            await bench.supervised.start()
            try:
                await test(bench)
            finally:
                await bench.supervised.close()

        def run() -> None:
            asyncio.run(main())

        run.__name__ = test.__name__
        return run

    return decorate


@pytest.mark.parametrize("way", [CRASH, VANISH, FREEZE], ids=["crash", "vanish", "freeze"])
def test_every_call_of_a_dying_engine_is_unavailable_and_the_next_one_answers(way: int) -> None:
    @on_a_bench(DEADLY)
    async def test(bench: Bench) -> None:
        waiting = [asyncio.create_task(call(1, HANG)) for call in (bench.score, bench.generate)]
        await asyncio.sleep(0)
        dying = [asyncio.create_task(bench.score(1, way)), asyncio.create_task(bench.generate(1, way))]
        for error in await asyncio.gather(*waiting, *dying, return_exceptions=True):
            assert isinstance(error, Unavailable), error
            assert error.retry_after_s
            assert "died and is started again" in error.message
        with pytest.raises(Unavailable):
            _ = bench.supervised.info
        await bench.until(EngineState.UP, 2)
        assert await bench.score(1, 2, 3) == 2
        assert await bench.generate(1, 2) == 4
        assert await bench.supervised.healthy()
        assert bench.states == [EngineState.UP, EngineState.DOWN, EngineState.STARTING, EngineState.UP]
        assert len(bench.engines) == 2

    test()


@on_a_bench(DEADLY)
async def test_an_idle_engines_death_is_seen(bench: Bench) -> None:
    bench.engines[0].vanish()
    await bench.until(EngineState.UP, 2)
    assert await bench.score(1, 2) == 1


@on_a_bench(DEADLY)
async def test_failures_of_a_living_engine_are_its_own(bench: Bench) -> None:
    with pytest.raises(TeacherFailed):
        await bench.score(1, FAIL)
    assert bench.states == [EngineState.UP]
    assert len(bench.engines) == 1


@on_a_bench(DEADLY)
async def test_a_caller_that_leaves_is_cancelled_and_nothing_is_restarted(bench: Bench) -> None:
    waiting = asyncio.create_task(bench.score(1, HANG))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    pieces = bench.supervised.generate(
        Sequence([1, 2]).token_ids, Sampling(500, ignore_eos=True), n=1, logprobs=False, stream=True, mode=None
    )
    async with aclosing(pieces) as stream:  # type: ignore[type-var]
        async for _ in stream:
            break
    assert bench.engines[0].counters.cancelled == 2
    assert bench.states == [EngineState.UP]


@on_a_bench(DEADLY, policy=RestartPolicy(attempts=2, backoff_s=0.0))
async def test_after_its_attempts_it_gives_up(bench: Bench) -> None:
    for life in (1, 2, 3):
        await bench.until(EngineState.UP, life)
        bench.engines[-1].vanish()
    await bench.until(EngineState.GIVEN_UP)
    assert bench.supervised.gave_up.endswith("died, and was started again 2 times in 600 s")
    with pytest.raises(Unavailable, match="gives up"):
        await bench.score(1, 2)
    assert len(bench.engines) == 3


@on_a_bench(DEADLY, policy=RestartPolicy(attempts=1, window_s=0.05, backoff_s=0.0))
async def test_restarts_that_are_long_past_do_not_count(bench: Bench) -> None:
    for life in (1, 2, 3):
        await bench.until(EngineState.UP, life)
        await asyncio.sleep(0.1)
        bench.engines[-1].vanish()
    await bench.until(EngineState.UP, 4)


@on_a_bench(DEADLY, Behaviour(broken="no weights today"), DEADLY)
async def test_a_start_that_fails_is_tried_again(bench: Bench) -> None:
    bench.engines[0].vanish()
    await bench.until(EngineState.UP, 2)
    assert len(bench.engines) == 3
    assert bench.states.count(EngineState.STARTING) == 2


@on_a_bench(DEADLY, Behaviour(kappa=2.0))
async def test_another_model_is_refused_with_both_fingerprints(bench: Bench) -> None:
    first = bench.supervised.info.fingerprint
    bench.engines[0].vanish()
    await bench.until(EngineState.GIVEN_UP)
    assert first in bench.supervised.gave_up
    assert bench.engines[1].info.fingerprint in bench.supervised.gave_up
    assert not await bench.engines[1].healthy()


@on_a_bench(Behaviour(close_s=math.inf), DEADLY)
async def test_an_engine_that_does_not_end_is_left_alone(bench: Bench) -> None:
    bench.engines[0].vanish()
    await bench.until(EngineState.UP, 2)
    assert bench.supervised.left_behind
    assert await bench.score(1, 2) == 1


@on_a_bench(Behaviour(close_s=0.1), DEADLY)
async def test_an_engine_that_ends_slowly_is_waited_for(bench: Bench) -> None:
    bench.engines[0].vanish()
    await bench.until(EngineState.UP, 2)
    assert not bench.supervised.left_behind


def test_the_transformers_backend_is_started_again(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BackendOptions(model=str(saved("qwen3")), device="cpu", batch_tokens=512)
    states: list[EngineState] = []
    sequence, spec = Sequence([1, 2, 3, 4]), ScoreSpec(2)

    async def main() -> None:
        up = asyncio.Event()

        def on_state(state: EngineState) -> None:
            states.append(state)
            (up.set if state is EngineState.UP else up.clear)()

        supervised = Supervised(lambda: make_backend(options), FAST, on_state, QUICK)
        await supervised.start()
        before = await supervised.score(sequence, spec)
        with monkeypatch.context() as patch:
            fail_in_forward(patch, lambda _: torch.AcceleratorError("device lost"))
            with pytest.raises(Unavailable, match="is started again"):
                await supervised.score(sequence, spec)
        await asyncio.wait_for(up.wait(), 60)
        after = await supervised.score(sequence, spec)
        np.testing.assert_array_equal(after.top_logprobs, before.top_logprobs)
        assert len(await collected(supervised)) == 5
        await supervised.close()
        assert not supervised.left_behind

    asyncio.run(main())
    assert states == [EngineState.UP, EngineState.DOWN, EngineState.STARTING, EngineState.UP]


async def collected(backend: Backend) -> list[int]:
    """Five new tokens."""
    return (await complete(backend, ids_of(np.random.default_rng(0), 4), max_tokens=5, ignore_eos=True)).tokens[0]


def test_closing_ends_calls_and_restarts() -> None:
    async def main() -> None:
        bench = Bench(DEADLY, policy=RestartPolicy(backoff_s=60.0))
        await bench.supervised.start()
        waiting = asyncio.create_task(bench.score(1, HANG))
        await asyncio.sleep(0)
        await bench.supervised.close()
        with pytest.raises(Unavailable):
            await waiting
        bench = Bench(DEADLY, policy=RestartPolicy(backoff_s=60.0))
        await bench.supervised.start()
        bench.engines[0].vanish()
        await bench.until(EngineState.DOWN)
        await bench.supervised.close()
        assert len(bench.engines) == 1
        assert not bench.supervised.left_behind

    asyncio.run(main())


def test_a_first_start_that_fails_is_the_operators() -> None:
    async def main() -> None:
        bench = Bench(Behaviour(broken="no weights today"))
        with pytest.raises(ValueError, match="no weights today"):
            await bench.supervised.start()
        await bench.supervised.close()

    asyncio.run(main())
