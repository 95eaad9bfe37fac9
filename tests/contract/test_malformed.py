"""Bytes and JSON that are no call at all."""

from __future__ import annotations

from typing import Any

import grpc
import httpx
import pytest

from protos import codec
from protos.teacher.v1 import teacher_pb2 as pb
from protos.teacher.v1 import teacher_pb2_grpc
from tests.servers import Server

PROTOBUF = {"content-type": "application/x-protobuf"}


def refused(response: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    """The problem details of a refused request."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "instance", "reason"} <= set(body)
    assert (body["status"], body["reason"]) == (status, reason)
    return body


@pytest.mark.parametrize("path", ["/v1/score", "/v1/generate"])
def test_bytes_that_are_no_message_are_an_invalid_request(theoretical_server: Server, path: str) -> None:
    response = httpx.post(theoretical_server.http + path, content=b"\xff\xff\xff", headers=PROTOBUF)
    assert "3 bytes is not a teacher.v1" in refused(response, 422, "INVALID_REQUEST")["detail"]


@pytest.mark.parametrize("path", ["/v1/score", "/v1/generate"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"no": 1}', b"\xff"])
def test_json_that_is_no_call_is_an_invalid_request(theoretical_server: Server, path: str, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(theoretical_server.http + path, content=content, headers=headers)
    refused(response, 422, "INVALID_REQUEST")


@pytest.mark.parametrize(
    ("message", "words", "index"),
    [
        (pb.ScoreRequest(), "no sequences", None),
        (pb.ScoreRequest(sequences=[pb.Sequence(token_ids=b"12345")]), "5 bytes, not a multiple of 4", 0),
        (pb.ScoreRequest(sequences=[pb.Sequence(index=3)]), "number them from 0", 3),
        (pb.ScoreRequest(sequences=[pb.Sequence(token_ids=b"\0" * 4)]), "at least 2 tokens", 0),
        (pb.ScoreRequest(sequences=[pb.Sequence(token_ids=b"\0" * 8, score_start=2)]), "from 1 to 1", 0),
        (pb.ScoreRequest(sequences=[pb.Sequence(token_ids=b"\0" * 8, candidates=2)]), "expected 1 positions x 2", 0),
        (pb.ScoreRequest(sequences=[pb.Sequence(token_ids=b"\0" * 8)], want=[9]), "unknown fields", None),
        (pb.ScoreRequest(sequences=[pb.Sequence(token_ids=b"\0" * 8)], want=[2]), "top_k is 0", None),
        (pb.ScoreRequest(sequences=[pb.Sequence(token_ids=b"\0" * 8)], temperatures=[0.0]), "above 0", None),
        (pb.ScoreRequest(sequences=[pb.Sequence(token_ids=b"\0" * 8)], temperatures=[float("nan")]), "finite", None),
        (pb.GenerateRequest(), "no prompts", None),
        (pb.GenerateRequest(prompts=[pb.Prompt(text="x")]), "max_tokens must be at least 1", None),
        (pb.GenerateRequest(prompts=[pb.Prompt()], sampling=pb.Sampling(max_tokens=1)), "exactly one of", 0),
        (
            pb.GenerateRequest(prompts=[pb.Prompt(text="x", token_ids=b"\0" * 4)], sampling=pb.Sampling(max_tokens=1)),
            "exactly one of messages, token_ids and text, got 2",
            0,
        ),
        (
            pb.GenerateRequest(prompts=[pb.Prompt(text="x")], sampling=pb.Sampling(max_tokens=1, top_p=1.5)),
            "top_p must be",
            None,
        ),
    ],
)
def test_messages_that_make_no_sense_are_refused_on_both_transports(
    theoretical_server: Server, message: Any, words: str, index: int | None
) -> None:
    score = isinstance(message, pb.ScoreRequest)
    path = "/v1/score" if score else "/v1/generate"
    response = httpx.post(theoretical_server.http + path, content=message.SerializeToString(), headers=PROTOBUF)
    reason = "INVALID_SEQUENCE" if index is not None else response.json()["reason"]
    body = refused(response, 422, reason)
    assert words in body["detail"]
    assert body.get("index") == index
    with grpc.insecure_channel(theoretical_server.grpc) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Score(iter([message])) if score else stub.Generate(message))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert caught.value.details() == body["detail"]  # type: ignore[attr-defined]


def test_an_empty_grpc_stream_is_an_invalid_request(theoretical_server: Server) -> None:
    with grpc.insecure_channel(theoretical_server.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        list(teacher_pb2_grpc.TeacherServiceStub(channel).Score(iter([])))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
    assert codec.GRPC_NUMBERS["INVALID_ARGUMENT"] == 3
