"""Scores of the transformers backend against the float64 reference, whatever is batched together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protos.scores import Field, ScoreSpec, Sequence
from teacher_server.backends import readout
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.transformers_backend import TransformersBackend
from tests.teacher_server.backends.helpers import ids_of
from tests.teacher_server.backends.reference import Reference

VOCAB = 261


def mixed_burst(rng: np.random.Generator, count: int, longest: int) -> list[tuple[Sequence, ScoreSpec]]:
    """Sequences of mixed lengths, starts, candidates and specifications."""
    specs = [
        ScoreSpec(),
        ScoreSpec(top_k=1),
        ScoreSpec(top_k=16, temperatures=(1.0, 2.0, 0.7)),
        ScoreSpec(top_k=VOCAB, temperatures=(3.0,)),
        ScoreSpec(top_k=5, want=frozenset({Field.TAIL_LOGPROB})),
        ScoreSpec(top_k=5, want=frozenset({Field.TOP, Field.CANDIDATE_LOGPROBS})),
    ]
    burst = []
    for i in range(count):
        n = 2 if i == 0 else longest if i == 1 else int(rng.integers(2, longest + 1))
        start = int(rng.integers(1, n))
        c = (0, 3, 7)[i % 3]
        candidates = rng.permuted(np.tile(np.arange(VOCAB), (n - start, 1)), axis=1)[:, :c]
        burst.append((Sequence(ids_of(rng, n, VOCAB), start, candidates if c else None), specs[i % len(specs)]))
    return burst


def score_all(backend: TransformersBackend, burst: list[tuple[Sequence, ScoreSpec]]) -> list[Any]:
    async def run() -> list[Any]:
        return await asyncio.gather(*(backend.score(s, spec) for s, spec in burst), return_exceptions=True)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("kind", "count", "longest"),
    [("qwen3", 40, 300), ("qwen3_moe", 24, 120), ("llama", 12, 120), ("gpt2", 12, 120), ("gemma2", 12, 40),
     ("granite", 12, 40)],
)  # fmt: skip
def test_every_field_agrees_with_float64_to_1e_4_whatever_is_batched_together(
    kind: str, count: int, longest: int, saved: Callable[[str], Path], started: Callable[..., TransformersBackend]
) -> None:
    backend = started(kind, batch_tokens=1500)
    reference = Reference(saved(kind), VOCAB)
    burst = mixed_burst(np.random.default_rng(1), count, longest)
    for (sequence, spec), scores in zip(burst, score_all(backend, burst), strict=True):
        reference.check(scores, sequence, spec, 1e-4)


def test_chunks_smaller_than_a_sequence_change_nothing(
    saved: Callable[[str], Path], started: Callable[..., TransformersBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readout, "chunk_rows", lambda *_: 7)
    backend = TransformersBackend(BackendOptions(model=str(saved("qwen3")), device="cpu"))
    reference = Reference(saved("qwen3"), VOCAB)
    burst = mixed_burst(np.random.default_rng(2), 12, 40)
    try:
        asyncio.run(backend.start())
        for (sequence, spec), scores in zip(burst, score_all(backend, burst), strict=True):
            reference.check(scores, sequence, spec, 1e-4)
    finally:
        asyncio.run(backend.close())


def test_the_normaliser_at_temperature_1_is_exactly_0_and_the_tail_of_everything_is_the_floor(
    started: Callable[..., TransformersBackend],
) -> None:
    sequence = Sequence(ids_of(np.random.default_rng(3), 20))
    (scores,) = score_all(started("qwen3", batch_tokens=1500), [(sequence, ScoreSpec(top_k=VOCAB))])
    assert (scores.log_normalizer == 0).all()
    assert (scores.tail_logprob == -100).all()


def test_padded_rows_of_the_vocabulary_take_no_mass(started: Callable[..., TransformersBackend]) -> None:
    backend = started("qwen3", batch_tokens=1500)
    sequence = Sequence(ids_of(np.random.default_rng(4), 30))
    (scores,) = score_all(backend, [(sequence, ScoreSpec(top_k=VOCAB))])
    assert backend.info.vocab_size == backend.info.normalized_size == VOCAB
    assert scores.top_token_ids.max() < VOCAB
    np.testing.assert_allclose(np.exp(scores.top_logprobs.astype(np.float64)).sum(1), 1, atol=1e-5)


def test_a_half_precision_model_gives_positive_tails(started: Callable[..., TransformersBackend]) -> None:
    backend = started("qwen3", batch_tokens=1500, dtype="bfloat16")
    sequence = Sequence(ids_of(np.random.default_rng(5), 200))
    (scores,) = score_all(backend, [(sequence, ScoreSpec(top_k=8))])
    mass = np.exp(scores.top_logprobs.astype(np.float64)).sum(1) + np.exp(scores.tail_logprob[:, 0].astype(np.float64))
    np.testing.assert_allclose(mass, 1, atol=1e-5)
    assert backend.info.dtype == "bfloat16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "gpt2", "gemma2"])
def test_a_gpu_agrees_with_float64_too(kind: str, saved: Callable[[str], Path]) -> None:
    reference = Reference(saved(kind), VOCAB)
    backend = TransformersBackend(BackendOptions(model=str(saved(kind)), device="cuda", dtype="float32"))
    burst = mixed_burst(np.random.default_rng(6), 30, 200)
    try:
        asyncio.run(backend.start())
        for (sequence, spec), scores in zip(burst, score_all(backend, burst), strict=True):
            reference.check(scores, sequence, spec, 1e-4)
    finally:
        asyncio.run(backend.close())
