"""Hidden states of the transformers backend: with the head they are its own scores, and only then they are offered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from protos.errors import Unsupported
from protos.head import Head, logits
from protos.scores import Field, ScoreSpec, Sequence
from teacher_server.backends.transformers_backend import TransformersBackend
from tests.teacher_server.backends.helpers import ids_of
from tests.teacher_server.backends.test_transformers_scores import VOCAB, score_all

SPEC = ScoreSpec(VOCAB, want=frozenset({Field.HIDDEN_STATES, Field.TOP}))


def parts_of(backend: TransformersBackend, rows: int) -> list[Head]:
    async def run() -> list[Head]:
        return [part async for part in backend.head(rows)]

    return asyncio.run(run())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe", "llama", "gpt2"])
def test_head_times_hidden_states_are_the_teachers_scores_in_its_own_dtype(
    kind: str, dtype: str, started: Callable[..., TransformersBackend]
) -> None:
    backend = started(kind, batch_tokens=1500, dtype=dtype)
    assert (backend.info.hidden_size, backend.info.hidden_dtype) == (64, dtype)
    parts = parts_of(backend, 100)
    assert [(p.first_row, p.last_row, p.total_rows) for p in parts] == [(0, 100, 261), (100, 200, 261), (200, 261, 261)]
    head = Head(np.concatenate([p.weight for p in parts]), dtype)
    rng = np.random.default_rng(1)
    sequences = [Sequence(ids_of(rng, n, VOCAB), start) for n, start in ((2, 1), (60, 20), (33, 1))]
    for scores in score_all(backend, [(sequence, SPEC) for sequence in sequences]):
        z_TV = logits(scores.hidden_states, dtype, head).astype(np.float64)
        l_TV = (
            z_TV - np.log(np.exp(z_TV - z_TV.max(1, keepdims=True)).sum(1, keepdims=True)) - z_TV.max(1, keepdims=True)
        )
        np.testing.assert_allclose(np.take_along_axis(l_TV, scores.top_token_ids, 1), scores.top_logprobs, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_a_model_that_changes_its_logits_after_the_head_offers_neither(
    kind: str, started: Callable[..., TransformersBackend]
) -> None:
    backend = started(kind, batch_tokens=1500)
    info = backend.info
    assert (info.hidden_size, info.hidden_dtype, info.fields) == (0, "", frozenset(Field) - {Field.HIDDEN_STATES})
    with pytest.raises(Unsupported, match="not its LM head times its hidden states"):
        parts_of(backend, 10)
