"""Generation of the vLLM backend: the model's own log-probabilities, both modes, budgets, shared prompts, aborts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from protos.errors import Unsupported
from protos.scores import FinishReason, Message, Mode, Sampling, ScoreSpec, Sequence
from tests.teacher_server.backends.helpers import Collected, check_alternatives, check_dropped, complete, ids_of
from tests.teacher_server.backends.vllm.conftest import Run

pytestmark = pytest.mark.vllm
EOS = {256, 258}
OPEN, CLOSE = 259, 260


@pytest.fixture
def backend(engine: Callable[[str], Any]) -> Any:
    return engine("qwen3")


def prompt(seed: int, length: int = 20) -> np.ndarray:
    return ids_of(np.random.default_rng(seed), length, 200)


def check_logprobs(run: Run, backend: Any, given: np.ndarray, made: Collected) -> None:
    for tokens, logprobs in zip(made.tokens, made.logprobs, strict=True):
        whole = np.concatenate([given, np.array(tokens, dtype=np.int32)])
        scores = run(backend.score(Sequence(whole, len(given)), ScoreSpec()))
        np.testing.assert_allclose(logprobs, scores.token_logprobs, atol=1e-4)


def test_sampled_logprobs_are_the_scores_of_the_same_tokens(run: Run, backend: Any) -> None:
    for seed, sampling in enumerate([{"temperature": 0.0}, {"temperature": 2.0}, {"top_p": 0.5}, {"top_k": 3}]):
        given = prompt(seed)
        made = run(complete(backend, given, n=3, max_tokens=12, seed=seed, **sampling))
        check_logprobs(run, backend, given, made)
        for tokens, reason in zip(made.tokens, made.reasons, strict=True):
            ended = tokens[-1] in EOS
            assert reason is (FinishReason.STOP if ended else FinishReason.LENGTH)
            assert len(tokens) == 12 or ended


def test_equal_seeds_give_equal_completions_and_samples_differ(run: Run, backend: Any) -> None:
    one, two = (run(complete(backend, prompt(1), n=4, max_tokens=10, seed=5)) for _ in range(2))
    assert one.tokens == two.tokens
    assert len({tuple(tokens) for tokens in one.tokens}) == 4
    assert run(complete(backend, prompt(1), n=4, max_tokens=10, seed=6)).tokens != one.tokens


def test_streamed_pieces_are_the_completion_in_parts(run: Run, backend: Any) -> None:
    whole = run(complete(backend, prompt(2), n=2, max_tokens=10, seed=1, ignore_eos=True))
    parts = run(complete(backend, prompt(2), n=2, max_tokens=10, seed=1, ignore_eos=True, stream=True))
    assert parts.tokens == whole.tokens
    assert whole.pieces == [1, 1]
    assert min(parts.pieces) > 1


def test_stop_ids_end_a_completion_and_eos_can_be_ignored(run: Run, backend: Any) -> None:
    free = run(complete(backend, prompt(3), max_tokens=30, seed=2, ignore_eos=True)).tokens[0]
    assert len(free) == 30
    wanted = free[7]
    made = run(complete(backend, prompt(3), max_tokens=30, seed=2, ignore_eos=True, stop_token_ids=(wanted,)))
    assert made.tokens[0] == free[: free.index(wanted) + 1]
    assert made.reasons == [FinishReason.STOP]


def test_no_padded_id_is_ever_sampled(run: Run, backend: Any) -> None:
    made = run(complete(backend, prompt(4), n=8, max_tokens=100, temperature=2.0, ignore_eos=True, seed=1))
    sampled = np.concatenate([np.array(tokens) for tokens in made.tokens])
    assert sampled.max() < 261
    assert len(set(sampled)) > 100


def test_the_modes_are_two_prompts(run: Run, backend: Any) -> None:
    turns = (Message("user", "1+1"),)
    thinking, other = (backend.text.render(turns, mode) for mode in (Mode.THINKING, Mode.NON_THINKING))
    assert len(other) > len(thinking)
    for given in (thinking, other):
        check_logprobs(run, backend, given, run(complete(backend, given, max_tokens=6, seed=3)))


@pytest.mark.parametrize("stream", [False, True])
def test_a_spent_budget_closes_the_think_block(run: Run, backend: Any, stream: bool) -> None:
    given = np.append(prompt(5), np.int32(OPEN))
    closing = list(backend.text.encode("\n</think>\n\n"))
    made = run(
        complete(backend, given, n=4, max_tokens=24, max_thinking_tokens=6, seed=4, ignore_eos=True, stream=stream)
    )
    check_logprobs(run, backend, given, made)
    closed = 0
    for tokens in made.tokens:
        assert len(tokens) == 24
        block = tokens[: tokens.index(CLOSE)]
        assert len(block) <= 6 + closing.index(CLOSE)
        closed += tokens[6 : 6 + len(closing)] == closing
    assert closed >= 3


def test_a_budget_counts_from_the_tag_that_the_model_writes(run: Run, backend: Any) -> None:
    open_alone = {"max_tokens": 700, "temperature": 2.0, "ignore_eos": True, "max_thinking_tokens": 2, "seed": 9}
    made = run(complete(backend, prompt(6), n=4, **open_alone)).tokens
    blocks = 0
    for tokens in made:
        inside = -1
        for token in tokens:
            if token == OPEN:
                inside, blocks = 0, blocks + 1
            elif token == CLOSE:
                inside = -1
            elif inside >= 0:
                inside += 1
                assert inside <= 3  # two thoughts and the closing newline
    assert blocks > 0


def test_the_samples_of_a_prompt_share_its_prefill(run: Run, backend: Any) -> None:
    given = prompt(7, 200)
    cached: list[int] = []
    llm = backend._engine._llm

    async def count() -> None:
        inner = llm.generate

        def generate(*arguments: Any, **options: Any) -> Any:
            async def watch() -> Any:
                async for output in inner(*arguments, **options):
                    if output.finished:
                        cached.append(output.num_cached_tokens)
                    yield output

            return watch()

        llm.generate = generate
        try:
            await complete(backend, given, n=4, max_tokens=2, seed=1)
        finally:
            llm.generate = inner

    run(count())
    assert len(cached) == 4
    assert sorted(cached)[1] >= 128  # all but the first read the prompt's blocks


@pytest.mark.parametrize("temperature", [0.001, 2.5])
def test_a_temperature_that_vllm_would_change_is_refused(run: Run, backend: Any, temperature: float) -> None:
    with pytest.raises(Unsupported, match=f"from 0.01 to 2, got {temperature}"):
        run(complete(backend, prompt(9), max_tokens=2, temperature=temperature))


def test_equal_seeds_hold_for_prompts_that_are_read_in_parts(run: Run, backend: Any) -> None:
    async def crowd(size: int) -> list[list[int]]:
        made = await asyncio.gather(
            *(complete(backend, prompt(10 + i, 300), max_tokens=6, seed=1) for i in range(size))
        )
        return [each.tokens[0] for each in made]

    assert run(crowd(5))[:2] == run(crowd(2))


def test_closing_a_stream_aborts_it_in_the_engine(run: Run, backend: Any) -> None:
    async def begin() -> int:
        sampling = Sampling(600, ignore_eos=True)
        stream = backend.generate(prompt(8), sampling, n=4, logprobs=False, stream=True, mode=None)
        async for _ in stream:
            break
        before = backend._engine._llm.get_num_unfinished_requests()
        await stream.aclose()
        await asyncio.sleep(0.1)
        assert backend._engine._llm.get_num_unfinished_requests() == 0
        return int(before)

    assert run(begin()) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_alternatives_of_sampled_tokens_are_those_of_a_score(run: Run, backend: Any, stream: bool) -> None:
    plain = {"max_tokens": 12, "seed": 3, "ignore_eos": True}
    run(check_alternatives(backend, prompt(21), stream=stream, **plain))
    opened = np.append(prompt(23), np.int32(OPEN))
    run(check_alternatives(backend, opened, stream=stream, max_thinking_tokens=4, **plain))  # closing tokens too


def test_a_completion_that_nobody_waits_for_leaves_the_batch_alone(run: Run, backend: Any) -> None:
    async def check() -> None:
        await check_dropped(backend, prompt(22), 200)
        await asyncio.sleep(0.1)
        assert backend._engine._llm.get_num_unfinished_requests() == 0

    run(check())
