"""The theoretical teacher: its closed forms, its promises as a backend, its failures on purpose."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np
import pytest

from protos.errors import TeacherFailed, Unavailable
from protos.scores import Field, FinishReason, Mode, ScoreSpec, Sequence
from teacher_server.backends.base import Backend
from teacher_server.backends.factory import make_backend
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.theoretical_backend import Behaviour, TheoreticalBackend
from teacher_server.backends.theory import Ring
from tests.teacher_server.backends.helpers import check_alternatives, check_dropped, complete, ids_of

OPTIONS = BackendOptions(model="theory", backend="theoretical")
RNG = np.random.default_rng(0)


def made(**behaviour: Any) -> TheoreticalBackend:
    return TheoreticalBackend(OPTIONS, Behaviour(**behaviour))


async def started(**behaviour: Any) -> TheoreticalBackend:
    backend = made(**behaviour)
    await backend.start()
    return backend


@pytest.mark.parametrize("kappa", [0.5, 3.0, 8.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0])
def test_the_closed_forms_are_the_sums(kappa: float, temperature: float) -> None:
    ring = Ring(261, kappa)
    l_TV = ring.logprobs(np.arange(261, dtype=np.int32))
    np.testing.assert_allclose(np.exp(l_TV).sum(1), 1, atol=1e-12)
    sums = np.log(np.exp(l_TV / temperature).sum(1))
    np.testing.assert_allclose(sums, ring.log_normalizer(temperature), atol=1e-12)
    assert all(len(set(row)) == 261 for row in l_TV.round(12).tolist())


def test_every_field_is_there_and_consistent() -> None:
    sequence = Sequence(ids_of(RNG, 50), 7, np.tile(np.arange(5), (43, 1)))
    spec = ScoreSpec(top_k=10, temperatures=(1.0, 2.0))

    async def run() -> Any:
        return await (await started()).score(sequence, spec)

    scores = asyncio.run(run())
    assert scores.finite()
    assert set(scores.arrays()) == {
        "token_logprobs", "top_token_ids", "top_logprobs", "candidate_logprobs", "log_normalizer", "tail_logprob"
    }  # fmt: skip
    for m, t in enumerate(spec.temperatures):
        q = np.exp(scores.top_logprobs / t - scores.log_normalizer[:, m : m + 1]).sum(1)
        np.testing.assert_allclose(q + np.exp(scores.tail_logprob[:, m]), 1, atol=1e-5)
    assert (np.diff(scores.top_logprobs, axis=1) < 0).all()
    everything = made().ring.score(sequence, ScoreSpec(top_k=261, want=frozenset({Field.TAIL_LOGPROB})))
    assert list(everything.arrays()) == ["tail_logprob"]
    assert (everything.tail_logprob == -100).all()


def test_it_is_a_backend_that_the_factory_makes() -> None:
    backend: Backend = make_backend(OPTIONS)
    info = backend.info
    assert info.name == "theory"
    assert info.vocab_size == info.normalized_size == 261
    assert info.modes == (Mode.THINKING, Mode.NON_THINKING)
    assert info.fingerprint == made().info.fingerprint != made(kappa=2.0).info.fingerprint


def test_generation_follows_the_chain_the_seed_and_the_stop_ids() -> None:
    async def run() -> None:
        backend = await started()
        prompt = ids_of(RNG, 5)
        first, second = [await complete(backend, prompt, n=3, max_tokens=40, seed=1, stream=s) for s in (True, False)]
        assert first.tokens == second.tokens
        assert second.pieces == [1, 1, 1]
        for tokens, logprobs, reason in zip(first.tokens, first.logprobs, first.reasons, strict=True):
            last = np.array([prompt[-1], *tokens[:-1]], dtype=np.int32)
            np.testing.assert_allclose(logprobs, backend.ring.logprobs(last)[range(len(tokens)), tokens], atol=1e-5)
            assert reason is (FinishReason.STOP if tokens[-1] in (256, 258) else FinishReason.LENGTH)
        greedy = await complete(backend, prompt, max_tokens=3, temperature=0.0, ignore_eos=True)
        top = await complete(backend, prompt, max_tokens=3, top_k=1, ignore_eos=True)
        nucleus = await complete(backend, prompt, max_tokens=3, top_p=1e-9, ignore_eos=True)
        assert greedy.tokens == top.tokens == nucleus.tokens
        thought = np.append(prompt, np.int32(259)).astype(np.int32)
        budget = await complete(backend, thought, max_tokens=12, seed=1, ignore_eos=True, max_thinking_tokens=4)
        assert 260 in budget.tokens[0][:6]

    asyncio.run(run())


def test_its_failures_are_as_asked() -> None:
    async def run() -> None:
        backend = await started(failing_id=1, hanging_id=2, crashing_id=3)
        fine, failing, hanging, crashing = (Sequence(np.array([9, i], dtype=np.int32)) for i in (9, 1, 2, 3))
        await backend.score(fine, ScoreSpec())
        with pytest.raises(TeacherFailed):
            await backend.score(failing, ScoreSpec())
        assert await backend.healthy()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(backend.score(hanging, ScoreSpec()), 0.05)
        assert backend.counters.cancelled == 1
        flight = asyncio.create_task(backend.score(hanging, ScoreSpec()))
        await asyncio.sleep(0)
        for sequence in (crashing, fine):
            with pytest.raises(Unavailable):
                await backend.score(sequence, ScoreSpec())
        with pytest.raises(Unavailable):
            await flight
        assert not await backend.healthy()

    asyncio.run(run())


def test_its_speed_is_as_asked() -> None:
    async def run() -> float:
        backend = await started(tokens_per_second=10_000, latency_s=0.05)
        began = time.monotonic()
        await asyncio.gather(*(backend.score(Sequence(ids_of(RNG, 200)), ScoreSpec()) for _ in range(10)))
        return time.monotonic() - began

    assert 0.2 <= asyncio.run(run()) < 0.6


def test_closing_ends_what_is_in_flight() -> None:
    async def run() -> None:
        backend = await started(hanging_id=2)
        flight = asyncio.create_task(complete(backend, np.array([2], dtype=np.int32), max_tokens=3))
        await asyncio.sleep(0)
        await backend.close()
        with pytest.raises(Unavailable):
            await flight

    asyncio.run(run())


def test_alternatives_of_sampled_tokens_are_those_of_a_score() -> None:
    async def check() -> None:
        backend = await started()
        await check_alternatives(backend, np.array([5, 6], np.int32), stream=True, max_tokens=12, ignore_eos=True)
        await check_dropped(backend, np.array([5, 6], np.int32), 60)

    asyncio.run(check())
