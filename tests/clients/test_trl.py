"""TRL's own client of a teacher behind `/v1/completions` and `/v1/chat/completions`, pointed at this server.

TRL wants vLLM to be importable before it makes the client, although what is used of it here speaks HTTP alone; the
check is answered for it. Its weight transfer and `/inference/v1/generate` are vLLM's own and not tried.
"""

from __future__ import annotations

import warnings
from typing import Any

import httpx
import numpy as np
import pytest

from tests.clients.conftest import Teacher

pytest.importorskip("trl")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of packages that TRL imports
    from trl.generation import vllm_client

TOP_K = 8
SEQUENCES = ["Calculate 12+30=42", "Calculate 7-5=2"]
QUESTION = [{"role": "user", "content": "Calculate 12+30"}]


@pytest.fixture
def client(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> Any:
    """It."""
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    return vllm_client.VLLMClient(base_url=teacher.http)


def scores(teacher: Teacher, ids: list[list[int]], starts: list[int]) -> list[dict[str, Any]]:
    """Score's answers."""
    sequences = [{"token_ids": one, "score_start": start} for one, start in zip(ids, starts, strict=True)]
    body = {"sequences": sequences, "top_k": TOP_K}
    return list(httpx.post(f"{teacher.http}/v1/score", json=body, timeout=60).raise_for_status().json()["sequences"])


def test_a_distilling_trainers_scores_are_those_of_score(teacher: Teacher, client: Any) -> None:
    ids = [httpx.post(f"{teacher.http}/tokenize", json={"prompt": text}).json()["tokens"] for text in SEQUENCES]
    starts = [4, 2]
    found = client.get_sequence_logprobs(ids, starts, top_logprobs=TOP_K, chunk_size=1)
    outside = 0
    for index, truth in enumerate(scores(teacher, ids, starts)):
        assert found["logprob_token_ids"][index] == truth["top_token_ids"]
        np.testing.assert_allclose(found["logprobs"][index], truth["top_logprobs"], atol=1e-5)
        assert [row[0] for row in found["actual_token_ids"][index]] == ids[index][starts[index] :]
        actual = [row[0] for row in found["actual_logprobs"][index]]
        np.testing.assert_allclose(actual, truth["token_logprobs"], atol=1e-5)
        pairs = zip(ids[index][starts[index] :], truth["top_token_ids"], strict=True)
        outside += sum(token not in top for token, top in pairs)
    assert outside  # tokens beyond the top K have their log-probability too


def test_its_chats_come_with_token_ids_and_logprobs(teacher: Teacher, client: Any) -> None:
    options: dict[str, Any] = {"n": 2, "max_tokens": 24, "logprobs": 3, "generation_kwargs": {"seed": 3}}
    found = client.chat([QUESTION], **options, chat_template_kwargs={"enable_thinking": False})
    (prompt,) = found["prompt_ids"]
    assert len(found["completion_ids"]) == 2
    for completion, logprobs, named in zip(
        found["completion_ids"], found["logprobs"], found["logprob_token_ids"], strict=True
    ):
        (truth,) = scores(teacher, [prompt + completion], [len(prompt)])
        assert len(logprobs) == len(named) == len(completion)
        for t, row in enumerate(logprobs):
            assert row[:3] == pytest.approx(truth["top_logprobs"][t][:3], abs=1e-4)
