"""A plain HTTP client and no package of anybody: JSON in and out, server-sent events line by line."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.clients.conftest import NAME, Teacher


@pytest.fixture
def http(teacher: Teacher) -> Iterator[httpx.Client]:
    """A client."""
    with httpx.Client(base_url=teacher.http, timeout=60) as client:
        yield client


def test_text_becomes_tokens_and_tokens_text(http: httpx.Client) -> None:
    found = http.post("/tokenize", json={"model": NAME, "prompt": "12+30=", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "12+30="}
    score = http.post("/v1/score", json={"sequences": ["12+30="], "want": ["token_logprobs"]}).json()
    assert score["sequences"][0]["token_ids"] == found["tokens"]


def test_a_chats_tokens_are_those_that_its_template_makes(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": "Calculate 1+1"}]
    for thinking in (True, False):
        call = {"messages": messages, "chat_template_kwargs": {"enable_thinking": thinking}}
        tokens = http.post("/tokenize", json=call).json()["tokens"]
        answer = http.post("/v1/chat/completions", json=call | {"max_tokens": 1, "return_token_ids": True}).json()
        assert answer["prompt_token_ids"] == tokens
        prompt = http.post("/detokenize", json={"tokens": tokens}).json()["prompt"]
        assert ("</think>" in prompt) is not thinking


def test_a_stream_is_lines_of_json_that_end_with_done(http: httpx.Client) -> None:
    body = {"prompt": "1+1=", "max_tokens": 4, "stream": True, "logprobs": 1, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines[-1] == "[DONE]"
    rows = [json.loads(line)["choices"][0]["logprobs"] for line in lines[:-1]]
    assert sum(len(row["tokens"]) for row in rows) == 4
    assert all(len(top) in (1, 2) for row in rows for top in row["top_logprobs"])


def test_a_refusal_is_a_problem_with_openais_member(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 9999})
    problem = response.json()
    assert (response.status_code, response.headers["content-type"]) == (413, "application/problem+json")
    assert problem["error"] == {"message": problem["detail"], "type": "too_large", "param": None, "code": 413}
