"""An engine that hangs, fails on everything or does not start is seen, is not ready, and is started again."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protos.errors import TeacherFailed, Unavailable
from protos.scores import Sampling, ScoreSpec, Sequence
from teacher_server.backends.factory import make_backend
from teacher_server.backends.life import Patience
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.supervisor import EngineState, StartTooLong, Supervised
from teacher_server.backends.theoretical_backend import Behaviour, TheoreticalBackend
from tests.teacher_server.backends.test_supervisor import FAIL, FAST, HANG, OPTIONS, Bench, on_a_bench
from tests.teacher_server.backends.test_transformers_failures import fail_in_forward

CANARY_ID = 0
FINE = Behaviour()


def watching(**seconds: float) -> Patience:
    """A quick look, and what a test sets."""
    return Patience(look_s=0.02, answer_s=0.5, close_s=0.5, **seconds)


@on_a_bench(Behaviour(hanging_id=HANG), FINE, patience=watching(step_s=0.3))
async def test_an_engine_that_has_work_and_finishes_no_step_is_started_again(bench: Bench) -> None:
    with pytest.raises(Unavailable, match="died and is started again"):
        await bench.score(1, HANG)
    await bench.until(EngineState.UP, 2)
    assert await bench.score(1, HANG) == 1


def test_the_log_says_that_it_hung(caplog: pytest.LogCaptureFixture) -> None:
    test_an_engine_that_has_work_and_finishes_no_step_is_started_again()
    assert "the engine has 1 calls and has finished no step for 0 s; it is taken for hung" in caplog.text


@on_a_bench(FINE, patience=watching(canary_s=0.1))
async def test_an_idle_engine_is_asked_for_a_sign_of_life_and_stays_ready(bench: Bench) -> None:
    while bench.engines[0].counters.scored < 5:
        assert await bench.supervised.healthy()
        await asyncio.sleep(0.01)
    assert set(bench.engines[0].counters.score_order) == {2}
    assert bench.states == [EngineState.UP]


@on_a_bench(FINE, patience=watching(canary_s=0.3))
async def test_traffic_is_sign_enough(bench: Bench) -> None:
    for _ in range(100):
        await bench.score(1, 2, 3)
        await asyncio.sleep(0.01)
    assert set(bench.engines[0].counters.score_order) == {3}


@on_a_bench(Behaviour(hanging_id=CANARY_ID), FINE, patience=watching(canary_s=0.1, step_s=0.6))
async def test_an_engine_that_hangs_on_its_canary_is_not_ready_and_then_started_again(bench: Bench) -> None:
    while await bench.supervised.healthy():
        await asyncio.sleep(0.01)
    assert bench.states == [EngineState.UP]
    await bench.until(EngineState.UP, 2)
    assert await bench.supervised.healthy()


@on_a_bench(Behaviour(failing_id=CANARY_ID), FINE, patience=watching(canary_s=0.1))
async def test_an_engine_that_fails_on_every_canary_is_not_ready_and_then_started_again(bench: Bench) -> None:
    await bench.until(EngineState.DOWN)
    assert bench.engines[0].counters.scored == 3
    await bench.until(EngineState.UP, 2)
    assert await bench.supervised.healthy()


@on_a_bench(Behaviour(failing_id=FAIL), patience=watching(canary_s=0.1))
async def test_calls_that_fail_are_no_sign_of_life_but_a_canary_is(bench: Bench) -> None:
    for _ in range(50):
        with pytest.raises(TeacherFailed):
            await bench.score(1, FAIL)
        await asyncio.sleep(0.01)
    assert 2 in bench.engines[0].counters.score_order
    assert bench.engines[0].counters.scored > 50
    assert await bench.supervised.healthy()
    assert bench.states == [EngineState.UP]


@on_a_bench(Behaviour(tokens_per_second=50), patience=watching(canary_s=0.2, step_s=0.3))
async def test_a_long_completion_that_comes_at_its_end_is_no_hang(bench: Bench) -> None:
    pieces = bench.supervised.generate(
        Sequence([1, 2]).token_ids, Sampling(60, ignore_eos=True), n=1, logprobs=False, stream=False, mode=None
    )
    waiting = asyncio.create_task(anext(aiter(pieces)))
    while not waiting.done():
        assert await bench.supervised.healthy()
        await asyncio.sleep(0.01)
    assert len(waiting.result()[0].token_ids) == 60
    assert bench.states == [EngineState.UP]


def test_a_start_that_takes_too_long_is_refused_and_a_later_one_ends_the_server() -> None:
    let_go = threading.Event()

    def slow(made: list[TheoreticalBackend], fine: int) -> Callable[[], TheoreticalBackend]:
        def make() -> TheoreticalBackend:
            made.append(TheoreticalBackend(OPTIONS))
            if len(made) > fine:
                let_go.wait(30)
            return made[-1]

        return make

    async def main() -> None:
        first = Supervised(slow([], 0), FAST, lambda _: None, watching(start_s=0.1))
        with pytest.raises(StartTooLong, match=r"more than the 0\.1 s of watch\.start_s"):
            await first.start()
        assert first.left_behind
        await first.close()
        made: list[TheoreticalBackend] = []
        given_up = asyncio.Event()
        later = Supervised(
            slow(made, 1), FAST, lambda s: given_up.set() if s is EngineState.GIVEN_UP else None, watching(start_s=0.1)
        )
        await later.start()
        made[0].vanish()
        await asyncio.wait_for(given_up.wait(), 30)
        assert "the start took more than" in later.gave_up
        await later.close()
        let_go.set()

    asyncio.run(main())


@pytest.mark.slow
def test_a_thread_that_hangs_in_the_model_is_seen(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = BackendOptions(model=str(saved("qwen3")), device="cpu", batch_tokens=512)
    let_go, up = threading.Event(), threading.Event()
    states: list[EngineState] = []

    def on_state(state: EngineState) -> None:
        states.append(state)
        if len(states) == 4:
            up.set()

    def hang(_: list[Any]) -> None:
        let_go.wait(60)

    async def main() -> None:
        supervised = Supervised(lambda: make_backend(options), FAST, on_state, watching(step_s=0.5))
        await supervised.start()
        assert (await supervised.score(Sequence([1, 2, 3]), ScoreSpec())).positions == 2
        with monkeypatch.context() as patch:
            fail_in_forward(patch, hang)
            with pytest.raises(Unavailable, match="is started again"):
                await supervised.score(Sequence([1, 2]), ScoreSpec())
        await asyncio.to_thread(up.wait, 60)
        assert (await supervised.score(Sequence([1, 2]), ScoreSpec())).positions == 1
        assert supervised.left_behind  # a thread cannot be ended
        let_go.set()
        await supervised.close()

    asyncio.run(main())
    assert states[:4] == [EngineState.UP, EngineState.DOWN, EngineState.STARTING, EngineState.UP]
