"""Scores of the vLLM backend: equal to the transformers backend's, in any order, in one step or in several."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.errors import Unsupported
from protos.scores import Field, Scores, ScoreSpec, Sequence
from teacher_server.backends import vllm_check
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.transformers_backend import TransformersBackend
from tests.teacher_server.backends.helpers import ids_of
from tests.teacher_server.backends.vllm.conftest import Run

pytestmark = pytest.mark.vllm
VOCAB = 261
ALL = frozenset(Field)


@pytest.fixture(scope="module")
def reference(folder: Callable[[str], Path]) -> Iterator[Callable[[str, Sequence, ScoreSpec], Scores]]:
    """The transformers backend's score of one sequence by a kind of model."""
    running: dict[str, TransformersBackend] = {}

    def score(kind: str, sequence: Sequence, spec: ScoreSpec) -> Scores:
        if kind not in running:
            running[kind] = TransformersBackend(BackendOptions(model=str(folder(kind)), dtype="float32", device="cpu"))
            asyncio.run(running[kind].start())
        return asyncio.run(running[kind].score(sequence, spec))

    yield score
    for backend in running.values():
        asyncio.run(backend.close())


def sequence(seed: int, length: int, score_start: int = 1, candidates: int = 0) -> Sequence:
    rng = np.random.default_rng(seed)
    ids = ids_of(rng, length, VOCAB)
    asked = np.argsort(rng.random((length - score_start, VOCAB)), axis=1)[:, :candidates].astype(np.int32)
    return Sequence(ids, score_start, asked if candidates else None)


def assert_close(got: Scores, want: Scores, atol: float) -> None:
    assert got.arrays().keys() == want.arrays().keys()
    for name, array in want.arrays().items():
        if name == "top_token_ids":
            assert (getattr(got, name) == array).mean() > 0.99  # near ties may swap
        else:
            np.testing.assert_allclose(getattr(got, name), array, atol=atol, err_msg=name)


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_every_field_agrees_with_the_transformers_backend(
    kind: str, engine: Callable[[str], Any], run: Run, reference: Callable[..., Scores]
) -> None:
    backend = engine(kind)
    assert backend.info.fields == ALL
    assert (backend.info.vocab_size, backend.info.normalized_size) == (VOCAB, VOCAB)
    cases = [
        (sequence(1, 40), ScoreSpec()),
        (sequence(2, 700, 5, candidates=7), ScoreSpec(64, (1.0, 2.0, 0.5))),
        (sequence(3, 30, 29), ScoreSpec(1)),
        (sequence(4, 500, 499, candidates=1), ScoreSpec(VOCAB, (3.0,))),
        (sequence(5, 900, 640, candidates=3), ScoreSpec(16, want=ALL)),
        (sequence(6, 2), ScoreSpec(8)),
        (sequence(7, 300, 2), ScoreSpec(want=frozenset({Field.HIDDEN_STATES}))),
    ]

    async def together() -> list[Scores]:
        return await asyncio.gather(*(backend.score(*case) for case in cases))

    for case, got in zip(cases, run(together()), strict=True):
        assert_close(got, reference(kind, *case), 1e-4)


def test_a_crowd_of_sequences_gets_the_answers_that_each_gets_alone(engine: Callable[[str], Any], run: Run) -> None:
    backend = engine("qwen3")
    specs = [ScoreSpec(8), ScoreSpec(8, (2.0,)), ScoreSpec(3), ScoreSpec()]
    cases = [
        (sequence(i, 3 + 17 * i % 400, 1 + i % 2, candidates=i % 3 if i % 4 else 0), specs[i % 4]) for i in range(40)
    ]

    async def together() -> list[Scores]:
        return await asyncio.gather(*(backend.score(*case) for case in cases))

    crowd = run(together())
    for case, got in zip(cases, crowd, strict=True):
        assert_close(got, run(backend.score(*case)), 1e-4)


def test_the_lm_head_and_the_hidden_states_give_the_log_probabilities(engine: Callable[[str], Any], run: Run) -> None:
    backend = engine("qwen3")
    scores = run(backend.score(sequence(8, 50), ScoreSpec(VOCAB, want=ALL - {Field.CANDIDATE_LOGPROBS})))

    async def whole() -> np.ndarray:
        parts = [part async for part in backend.head(100)]
        assert [len(part.weight) for part in parts] == [100, 100, 61]
        assert [part.first_row for part in parts] == [0, 100, 200]
        return np.concatenate([part.weight for part in parts])

    weight_VH = run(whole())
    assert weight_VH.shape == (VOCAB, backend.info.hidden_size)
    logits = scores.hidden_states.astype(np.float64) @ weight_VH.astype(np.float64).T
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    got = np.take_along_axis(logprobs, scores.top_token_ids.astype(np.int64), 1)
    np.testing.assert_allclose(scores.top_logprobs, got, atol=1e-5)


def test_a_cancelled_score_leaves_the_engine_free(engine: Callable[[str], Any], run: Run) -> None:
    backend = engine("qwen3")

    async def cancel() -> None:
        tasks = [asyncio.create_task(backend.score(sequence(i, 900), ScoreSpec(4))) for i in range(8)]
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert any(isinstance(result, asyncio.CancelledError) for result in results)

    run(cancel())
    assert run(backend.score(sequence(9, 20), ScoreSpec(4))).positions == 19


def test_the_public_way_gives_the_same_and_refuses_the_rest(engine: Callable[[str], Any], run: Run) -> None:
    backend = engine("qwen3")
    public = vllm_check.Public(backend._engine, candidates=False)
    asked = ScoreSpec(8, want=frozenset({Field.TOP, Field.TOKEN_LOGPROBS}))
    case = sequence(10, 300, 100)
    assert_close(run(public.score(case, asked)), run(backend.score(case, asked)), 1e-4)
    with pytest.raises(Unsupported, match="log_normalizer, tail_logprob"):
        run(public.score(case, ScoreSpec(8)))


class Skewed:
    """An engine whose workers answer for other tokens than they were asked about."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.keeps_tensors, self.alive, self.config = True, True, engine.config

    async def ask(self, token_ids: Any, extra_args: Any, **options: Any) -> Any:
        return await self._engine.ask(token_ids[::-1].copy() if extra_args else token_ids, extra_args, **options)


def test_the_self_check_notices_answers_that_are_wrong(
    engine: Callable[[str], Any], run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    whole = engine("qwen3")._engine
    found = {"runner": "v1", "head": "direct"}
    assert run(vllm_check.why_not_extended(whole, found, VOCAB, "float32")) == ""
    reason = run(vllm_check.why_not_extended(Skewed(whole), found, VOCAB, "float32"))
    assert "nats away from vLLM's public log-probabilities" in reason
    for engine_, what in ((Skewed(whole), found), (whole, {})):
        with caplog.at_level(logging.WARNING):
            reader = run(vllm_check.choose(engine_, what, VOCAB, "float32", 8))
        assert reader.fields == {Field.TOKEN_LOGPROBS, Field.TOP}
        assert "no tails, no normalisers, no temperatures" in caplog.text
        assert "costs about 12 % of the prefill rate" in caplog.text
        caplog.clear()
