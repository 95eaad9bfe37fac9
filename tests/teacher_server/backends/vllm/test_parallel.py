"""Two workers that split the vocabulary between them say what one says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.scores import Field, ScoreSpec, Sequence
from teacher_server.backends.vllm_backend import VllmBackend
from tests.teacher_server.backends.helpers import ids_of
from tests.teacher_server.backends.vllm.conftest import Run, options

pytestmark = pytest.mark.vllm


def test_a_split_vocabulary_gives_the_scores_and_the_head_of_a_whole_one(
    engine: Callable[[str], Any], folder: Callable[[str], Path], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")  # else vLLM wants a NUMA node for each worker
    two = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    whole, split = engine("qwen3"), VllmBackend(options(folder("qwen3"), engine=two))
    rng = np.random.default_rng(0)
    candidates = np.argsort(rng.random((595, 261)), axis=1)[:, :9].astype(np.int32)
    case = (Sequence(ids_of(rng, 600, 261), 5, candidates), ScoreSpec(40, (1.0, 0.5, 3.0), frozenset(Field)))

    async def answer(backend: Any) -> tuple[Any, np.ndarray]:
        scores = await backend.score(*case)
        return scores, np.concatenate([part.weight async for part in backend.head(64)])

    async def both() -> Any:
        await split.start()
        try:
            return await asyncio.gather(answer(whole), answer(split))
        finally:
            await split.close()

    (want, head), (got, joined) = run(both())
    np.testing.assert_array_equal(joined, head)
    assert split.info.fields == whole.info.fields
    for name, array in want.arrays().items():
        if name == "top_token_ids":
            assert (got.top_token_ids == array).mean() > 0.99
        else:
            np.testing.assert_allclose(getattr(got, name), array, atol=1e-4, err_msg=name)
