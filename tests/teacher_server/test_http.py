"""HTTP as people and operators meet it: JSON, problem details, limits, pages."""

from __future__ import annotations

import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from protos import codec
from tests.servers import Server


def problem(response: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    """The checked problem details of a response."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert (body["status"], body["reason"]) == (status, reason)
    assert body["instance"] == f"urn:uuid:{response.headers['x-request-id']}"
    return body


def test_text_and_conversations_can_be_scored(http: httpx.Client, server: Server) -> None:
    question = {"messages": [{"role": "user", "content": "1+1?"}], "mode": "non_thinking", "completion": "2"}
    body = {"sequences": ["hello", [104, 101], {"text": "hel", "completion": "lo"}, question], "top_k": 1}
    answer = http.post("/v1/score", json=body).raise_for_status().json()
    text, ids, split, chat = answer["sequences"]
    assert answer["fingerprint"] == server.app.service.teacher().fingerprint
    assert text["tokens"] == list("hello")
    assert ids["token_ids"] == [104, 101]
    assert (split["score_start"], split["token_ids"]) == (3, text["token_ids"])
    assert split["token_logprobs"] == text["token_logprobs"][2:]
    assert chat["score_start"] == len(chat["token_ids"]) - 1
    assert "candidate_logprobs" not in text


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({"sequences": ["ab"], "topk": 1}, "unknown member topk, did you mean top_k"),
        ({"sequences": ["ab"], "score_start": 1}, "unknown member score_start; it belongs in sequences[i].score_start"),
        ({"sequences": ["ab"], "scor_start": 1}, "scor_start, did you mean sequences[i].score_start"),
        ({"sequences": [{"text": "ab", "score_strt": 1}]}, "sequences.0.score_strt, did you mean score_start"),
        ({"sequences": [{"text": "ab", "top_k": 1}]}, "sequences.0.top_k; it belongs in the body itself"),
        ({"sequences": [{"text": "ab", "rolle": 1}]}, "rolle, did you mean sequences[i].messages[i].role"),
        ({"sequences": []}, "sequences: List should have at least 1 item"),
        ({"sequences": ["ab"], "want": ["nothing"]}, "want.0: Input should be 'token_logprobs'"),
        ({"sequences": ["a"]}, "sequence 0: a sequence needs at least 2 tokens"),
        ({"sequences": [{"token_ids": [1, 2], "candidate_ids": [[1], [2]]}]}, "has 2 rows, 1 positions are scored"),
        ({"sequences": [{"token_ids": [1, 2, 3], "candidate_ids": [[1], [2, 3]]}]}, "as many ids in every row"),
        ({"sequences": [{"text": "a", "completion": "b", "completion_token_ids": [1]}]}, "not both"),
        ({"sequences": [{"text": "a", "token_ids": [1, 2]}]}, "exactly one of messages, token_ids and text"),
        ({"sequences": [[1, 2**40]]}, "token ids must fit int32"),
        ({"sequences": ["ab"], "temperatures": [0]}, "above 0"),
    ],
)
def test_json_that_cannot_be_honoured_is_refused_in_words(http: httpx.Client, body: Any, detail: str) -> None:
    response = http.post("/v1/score", json=body)
    assert detail in problem(response, 422, response.json()["reason"])["detail"]


def test_what_is_not_there_is_a_problem_too(http: httpx.Client) -> None:
    assert "/docs" in problem(http.get("/v1/nothing"), 404, "NOT_FOUND")["detail"]
    response = http.get("/v1/score")
    assert "use POST" in problem(response, 405, "METHOD_NOT_ALLOWED")["detail"]
    assert response.headers["allow"] == "POST"
    response = http.post("/v1/score", content=b"x", headers={"content-type": "text/plain"})
    detail = problem(response, 415, "UNSUPPORTED_MEDIA_TYPE")["detail"]
    assert "send application/json or application/x-protobuf" in detail


def test_a_body_that_is_too_large_is_refused_before_it_is_read(server: Server) -> None:
    address = urlsplit(server.http)
    with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
        head = (
            "POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 99000000\r\ncontent-type: application/json\r\n\r\n"
        )
        connection.sendall(head.encode())
        answer = ""
        while "}" not in answer:
            answer += connection.recv(65536).decode()
    assert answer.startswith("HTTP/1.1 413 ")
    assert "99000000 bytes, this server accepts 1048576" in answer


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(http: httpx.Client) -> None:
    response = http.post(
        "/v1/score", content=(b" " * 65536 for _ in range(64)), headers={"content-type": "application/json"}
    )
    assert "more than 1048576 bytes" in problem(response, 413, "TOO_LARGE")["detail"]


@pytest.mark.parametrize("timeout", ["soon", "-1", "inf", "nan"])
def test_a_deadline_that_is_no_time_is_refused(http: httpx.Client, timeout: str) -> None:
    response = http.post("/v1/score", json={"sequences": ["ab"]}, headers={"x-timeout-s": timeout})
    assert f"got '{timeout}'" in problem(response, 422, "INVALID_REQUEST")["detail"]


def test_the_description_comes_as_json_or_as_a_message(http: httpx.Client, server: Server) -> None:
    info = server.app.service.teacher()
    response = http.get("/v1/teacher", headers={"accept": "application/x-protobuf"})
    assert response.headers["content-type"] == "application/x-protobuf"
    assert codec.decode_teacher_bytes(response.content) == info
    body = http.get("/v1/teacher").json()
    assert body["modes"] == ["thinking", "non_thinking"]
    assert body["vocab_size"] == info.vocab_size


def test_the_api_is_described_with_its_bodies_and_examples(http: httpx.Client) -> None:
    document = http.get("/openapi.json").json()
    assert {"/v1/teacher", "/v1/score", "/v1/generate", "/v1/completions", "/v1/models"} <= set(document["paths"])
    body = document["paths"]["/v1/score"]["post"]["requestBody"]["content"]
    assert set(body) == {"application/json", "application/x-protobuf"}
    assert body["application/json"]["schema"]["$ref"] == "#/components/schemas/ScoreBody"
    schemas = document["components"]["schemas"]
    assert schemas["ScoreBody"]["properties"]["top_k"]["description"]

    def references(node: Any) -> set[str]:
        if isinstance(node, dict):
            here = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
            return here.union(*map(references, node.values()))
        return set().union(*map(references, node)) if isinstance(node, list) else set()

    assert {reference.rsplit("/", 1)[-1] for reference in references(document)} <= set(schemas)


@pytest.mark.parametrize(("path", "schema"), [("/v1/score", "ScoreBody"), ("/v1/generate", "GenerateBody")])
def test_every_documented_example_works(http: httpx.Client, path: str, schema: str) -> None:
    for example in http.get("/openapi.json").json()["components"]["schemas"][schema]["examples"]:
        assert http.post(path, json=example).status_code == 200, example


def test_the_page_of_the_routes_needs_nothing_from_elsewhere(http: httpx.Client) -> None:
    response = http.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    assert "/v1/score" in response.text
    assert "<script" not in response.text
    assert 'href="http' not in response.text
    assert 'src="' not in response.text


def test_metrics_count_calls_tokens_and_refusals(http: httpx.Client, server: Server) -> None:
    before = server.metric("teacher_scored_tokens_total")
    refused = server.metric("teacher_requests_total", method="score", outcome="INVALID_REQUEST")
    http.post("/v1/score", json={"sequences": ["never scored before"]}).raise_for_status()
    assert server.metric("teacher_scored_tokens_total") - before == 19
    http.post("/v1/score", json={"sequences": []})
    assert server.metric("teacher_requests_total", method="score", outcome="INVALID_REQUEST") == refused + 1
    generated = {
        mode: server.metric("teacher_generated_tokens_total", mode=mode) for mode in ("thinking", "non_thinking")
    }
    sampling = {"max_tokens": 4, "ignore_eos": True}
    body = {"prompts": [{"text": "x", "mode": "non_thinking"}], "sampling": sampling}
    http.post("/v1/generate", json=body).raise_for_status()
    now = {mode: server.metric("teacher_generated_tokens_total", mode=mode) for mode in generated}
    assert now == generated | {"non_thinking": generated["non_thinking"] + 4}
    text = http.get("/metrics").text
    for name in ("request_seconds_bucket", "queue_seconds_bucket", "cache_bytes", "in_flight", "submitted_tokens"):
        assert f"teacher_{name}" in text
