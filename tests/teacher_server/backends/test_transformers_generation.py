"""Generation of the transformers backend: equal to a plain loop, seeded, shared, streamed, fair."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from protos.scores import FinishReason, Message, Mode, Sampling, ScoreSpec, Sequence
from teacher_server.backends.transformers_backend import TransformersBackend
from tests.teacher_server.backends.helpers import Collected, check_alternatives, check_dropped, complete, ids_of
from tests.teacher_server.backends.reference import Reference

Start = Callable[..., TransformersBackend]
VOCAB = 261
EOS = {256, 258}
OPEN, CLOSE = 259, 260


def prompts(seed: int, count: int, longest: int = 40) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [ids_of(rng, int(rng.integers(1, longest)), 200) for _ in range(count)]


def check_logprobs(reference: Reference, prompt: np.ndarray, made: Collected, within: float = 1e-4) -> None:
    for tokens, logprobs in zip(made.tokens, made.logprobs, strict=True):
        whole = np.concatenate([prompt, np.array(tokens, dtype=np.int32)])
        l_RV = reference.logprobs(whole)[len(prompt) - 1 : -1]
        np.testing.assert_allclose(logprobs, np.take_along_axis(l_RV, np.array(tokens)[:, None], 1)[:, 0], atol=within)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt2", "gemma2"])
def test_greedy_completions_of_a_mixed_burst_equal_a_plain_float64_loop(
    kind: str, saved: Callable[[str], Path], started: Start
) -> None:
    backend, reference = started(kind, batch_tokens=1500), Reference(saved(kind), VOCAB)
    given = prompts(1, 12)

    async def run() -> list[Collected]:
        return await asyncio.gather(
            *(complete(backend, p, max_tokens=3 + i, temperature=0.0) for i, p in enumerate(given))
        )

    for i, (prompt, made) in enumerate(zip(given, asyncio.run(run()), strict=True)):
        ids = prompt
        for token in made.tokens[0]:
            l_V = reference.logprobs(ids)[-1]
            assert l_V[token] >= l_V.max() - 1e-4
            ids = np.append(ids, np.int32(token))
        assert made.reasons[0] is (FinishReason.STOP if ids[-1] in EOS else FinishReason.LENGTH)
        assert len(made.tokens[0]) == 3 + i or ids[-1] in EOS
        check_logprobs(reference, prompt, made)


def test_requests_that_arrive_while_others_run_join_them_and_get_exact_logprobs(
    saved: Callable[[str], Path], started: Start
) -> None:
    backend, reference = started("qwen3", batch_tokens=1500), Reference(saved("qwen3"), VOCAB)
    given = prompts(2, 30)

    async def late(i: int, prompt: np.ndarray) -> Collected:
        await asyncio.sleep(0.004 * i)
        return await complete(backend, prompt, n=1 + i % 3, max_tokens=5 + i, seed=i, ignore_eos=i % 2 == 0)

    async def run() -> list[Collected]:
        return await asyncio.gather(*(late(i, p) for i, p in enumerate(given)))

    for prompt, made in zip(given, asyncio.run(run()), strict=True):
        check_logprobs(reference, prompt, made)


def test_equal_seeds_give_equal_completions_whatever_else_runs(started: Start) -> None:
    backend = started("qwen3", batch_tokens=1500)
    prompt = prompts(3, 1)[0]

    async def alone() -> Collected:
        return await complete(backend, prompt, n=3, max_tokens=20, seed=2**64 - 1, temperature=0.8, ignore_eos=True)

    async def in_company() -> Collected:
        others = [complete(backend, p, max_tokens=25, seed=i) for i, p in enumerate(prompts(4, 20))]
        return (await asyncio.gather(alone(), *others))[0]

    first, second = asyncio.run(alone()), asyncio.run(in_company())
    assert first.tokens == second.tokens
    assert len({tuple(t) for t in first.tokens}) == 3, "samples of one prompt must differ"
    other = asyncio.run(complete(backend, prompt, n=1, max_tokens=20, seed=5, temperature=0.8, ignore_eos=True))
    assert other.tokens[0] not in first.tokens


def test_without_a_seed_completions_differ(started: Start) -> None:
    backend = started("qwen3", batch_tokens=1500)
    prompt = prompts(3, 1)[0]
    made = [asyncio.run(complete(backend, prompt, max_tokens=20, ignore_eos=True)).tokens for _ in range(2)]
    assert made[0] != made[1]


@pytest.mark.parametrize("cut", [{}, {"top_k": 4}, {"top_p": 0.6}, {"temperature": 2.0, "top_k": 10, "top_p": 0.8}])
def test_tokens_are_drawn_with_the_right_frequencies(
    cut: dict[str, float], saved: Callable[[str], Path], started: Start
) -> None:
    backend, reference = started("qwen3", batch_tokens=1500), Reference(saved("qwen3"), VOCAB)
    prompt, n = prompts(5, 1)[0], 4000
    made = asyncio.run(complete(backend, prompt, n=n, max_tokens=1, seed=1, **cut))  # type: ignore[arg-type]
    counts = np.bincount([t[0] for t in made.tokens], minlength=VOCAB)
    scaled = reference.logprobs(prompt)[-1] / cut.get("temperature", 1.0)
    order = np.argsort(-scaled)[: int(cut.get("top_k", 0)) or None]
    p = np.exp(scaled[order])
    p /= p.sum()
    p *= np.cumsum(p) - p < cut.get("top_p", 1.0)
    p /= p.sum()
    wanted = np.zeros(VOCAB)
    wanted[order] = p
    assert counts[wanted == 0].sum() == 0
    likely = wanted * n >= 5
    chi2 = ((counts - wanted * n)[likely] ** 2 / (wanted * n)[likely]).sum()
    free = likely.sum()
    assert chi2 < free + 5 * np.sqrt(2 * free) + 5


def test_stop_ids_end_a_completion_and_stay_in_it_unless_eos_is_ignored(started: Start) -> None:
    backend = started("qwen3", batch_tokens=1500)
    prompt = prompts(6, 1)[0]
    free = asyncio.run(complete(backend, prompt, max_tokens=30, seed=3, ignore_eos=True)).tokens[0]
    assert len(free) == 30
    stop = free[10]
    cut = asyncio.run(complete(backend, prompt, max_tokens=30, seed=3, ignore_eos=True, stop_token_ids=(stop,)))
    assert cut.tokens[0] == free[: free.index(stop) + 1]
    assert cut.reasons[0] is FinishReason.STOP


def test_the_length_limit_of_the_teacher_ends_a_completion(started: Start) -> None:
    backend = started("qwen3", batch_tokens=1500, max_sequence_tokens=32)
    made = asyncio.run(complete(backend, ids_of(np.random.default_rng(1), 30, 200), max_tokens=50, ignore_eos=True))
    assert len(made.tokens[0]) == 2
    assert made.reasons[0] is FinishReason.LENGTH


def test_streaming_yields_each_step_and_the_same_tokens(started: Start) -> None:
    backend = started("qwen3", batch_tokens=1500)
    prompt = prompts(7, 1)[0]
    whole, streamed = (
        asyncio.run(complete(backend, prompt, n=2, max_tokens=12, seed=9, ignore_eos=True, stream=stream))
        for stream in (False, True)
    )
    assert whole.tokens == streamed.tokens
    assert whole.pieces == [1, 1]
    assert streamed.pieces == [12, 12]


def test_samples_of_one_prompt_share_its_prefill(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from teacher_server.backends.sampling_loop import SamplingLoop

    real, sizes = SamplingLoop._run, []

    def run(self: SamplingLoop, ids: object, *rest: object) -> object:
        sizes.append(tuple(ids.shape))  # type: ignore[attr-defined]
        return real(self, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(SamplingLoop, "_run", run)
    asyncio.run(complete(started("qwen3", batch_tokens=1500), prompts(8, 1)[0], n=16, max_tokens=3, ignore_eos=True))
    assert sizes[0][0] == 1
    assert sizes[1:] == [(16, 1), (16, 1)]


def test_finished_rows_leave_the_batch(started: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    from teacher_server.backends.sampling_loop import SamplingLoop

    real, rows = SamplingLoop._run, []

    def run(self: SamplingLoop, ids: object, *rest: object) -> object:
        rows.append(int(ids.shape[0]))  # type: ignore[attr-defined]
        return real(self, ids, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(SamplingLoop, "_run", run)
    backend = started("qwen3", batch_tokens=1500)

    async def go() -> None:
        given = prompts(9, 16, 5)
        await asyncio.gather(*(complete(backend, p, max_tokens=2 + i, ignore_eos=True) for i, p in enumerate(given)))

    asyncio.run(go())
    assert rows[-1] <= 2
    needed = sum(2 + i for i in range(16))
    assert sum(rows) <= 1.15 * needed


def test_a_think_budget_closes_the_block(started: Start) -> None:
    backend = started("qwen3", batch_tokens=1500)
    prompt = np.append(backend.text.render((Message("user", "1+1"),), Mode.THINKING), np.int32(OPEN)).astype(np.int32)
    closing = backend.text.encode("\n</think>\n\n").tolist()
    made = asyncio.run(complete(backend, prompt, n=8, max_tokens=20, seed=1, ignore_eos=True, max_thinking_tokens=5))
    for tokens in made.tokens:
        close = tokens.index(CLOSE)
        assert close <= 6
        if close == 6:
            assert tokens[5 : 5 + len(closing)] == closing
    assert any(t.index(CLOSE) == 6 for t in made.tokens)


def test_neither_scores_nor_generations_starve_the_other(started: Start) -> None:
    backend = started("qwen3", batch_tokens=1500)
    rng = np.random.default_rng(10)
    sequences = [Sequence(ids_of(rng, 250, 200)) for _ in range(120)]

    async def run() -> tuple[float, float, float, list[float]]:
        began = time.monotonic()
        tokens: list[float] = []

        async def watch() -> float:
            async for _ in backend.generate(
                prompts(11, 1)[0], Sampling(60, seed=1, ignore_eos=True), n=1, logprobs=False, stream=True, mode=None
            ):
                tokens.append(time.monotonic() - began)
            return time.monotonic() - began

        async def scores() -> float:
            await asyncio.gather(*(backend.score(s, ScoreSpec(top_k=8)) for s in sequences))
            return time.monotonic() - began

        long = asyncio.create_task(complete(backend, prompts(12, 1)[0], n=16, max_tokens=200, ignore_eos=True))
        scored, generated = await asyncio.gather(scores(), watch())
        await long
        return scored, generated, time.monotonic() - began, tokens

    scored, _, whole, tokens = asyncio.run(run())
    assert sum(t < scored for t in tokens) >= 10, "generation stood still while scores ran"
    assert scored < whole, "scores waited for generation to end"


@pytest.mark.parametrize("stream", [False, True])
def test_alternatives_of_sampled_tokens_are_those_of_a_score(started: Start, stream: bool) -> None:
    (given,) = prompts(21, 1)
    asyncio.run(check_alternatives(started("qwen3"), given, stream=stream, max_tokens=12, seed=3, ignore_eos=True))


def test_a_completion_that_nobody_waits_for_leaves_the_batch_alone(started: Start) -> None:
    (given,) = prompts(22, 1)
    asyncio.run(check_dropped(started("qwen3"), given, 60))
