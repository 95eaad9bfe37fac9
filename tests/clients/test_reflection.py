"""What `grpcurl` does: services and messages from the server's own reflection, then calls, without generated code."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, json_format, message_factory
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from tests.clients.conftest import NAME, Teacher

SERVICE = "teacher.v1.TeacherService"


class Grpcurl:
    """A client that knows an address."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel = channel
        self._ask = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        self._pool = descriptor_pool.DescriptorPool()

    def list(self) -> list[str]:
        """`grpcurl ADDRESS list`."""
        (answer,) = self._ask(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        return sorted(service.name for service in answer.list_services_response.service)

    def describe(self, symbol: str) -> Any:
        """`grpcurl ADDRESS describe SYMBOL`, for a service."""
        (answer,) = self._ask(iter([reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol)]))
        known = set()
        waiting = list(answer.file_descriptor_response.file_descriptor_proto)
        files = {}
        while waiting:
            file = descriptor_pb2.FileDescriptorProto.FromString(waiting.pop())
            files[file.name] = file
            for name in set(file.dependency) - known - set(files):
                known.add(name)
                (more,) = self._ask(iter([reflection_pb2.ServerReflectionRequest(file_by_filename=name)]))
                waiting += more.file_descriptor_response.file_descriptor_proto
        added: set[str] = set()
        while len(added) < len(files):
            for name, file in files.items():
                if name not in added and set(file.dependency) <= added:
                    self._pool.Add(file)
                    added.add(name)
        return self._pool.FindServiceByName(symbol)

    def call(self, method: Any, data: dict[str, Any]) -> list[dict[str, Any]]:
        """`grpcurl -d DATA ADDRESS METHOD`: messages as JSON in, as JSON out."""
        request = message_factory.GetMessageClass(method.input_type)
        response = message_factory.GetMessageClass(method.output_type)
        kind = {
            (False, False): self._channel.unary_unary,
            (False, True): self._channel.unary_stream,
            (True, True): self._channel.stream_stream,
        }[method.client_streaming, method.server_streaming]
        ask = kind(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        message = json_format.ParseDict(data, request())
        answers = ask(iter([message]) if method.client_streaming else message, timeout=60)
        many = answers if method.server_streaming else [answers]
        return [json_format.MessageToDict(one, preserving_proto_field_name=True) for one in many]


@pytest.fixture
def grpcurl(teacher: Teacher) -> Iterator[Grpcurl]:
    """It, for the server."""
    with grpc.insecure_channel(teacher.grpc) as channel:
        yield Grpcurl(channel)


def test_the_services_are_listed_and_described(grpcurl: Grpcurl) -> None:
    assert {SERVICE, "grpc.health.v1.Health"} <= set(grpcurl.list())
    service = grpcurl.describe(SERVICE)
    assert {method.name for method in service.methods} == {"GetTeacher", "Score", "Generate", "GetHead"}
    assert {field.name for field in service.methods_by_name["Score"].input_type.fields} >= {"sequences"}


def test_the_teacher_is_asked_and_scores_without_generated_code(grpcurl: Grpcurl, teacher: Teacher) -> None:
    methods = grpcurl.describe(SERVICE).methods_by_name
    (about,) = grpcurl.call(methods["GetTeacher"], {})
    assert (about["name"], about["vocab_size"]) == (NAME, 305)
    assert "MODE_THINKING" in about["modes"]
    ids = [49, 50, 43, 51, 48, 61]
    data = {"sequences": [{"token_ids": base64.b64encode(np.array(ids, "<i4").tobytes()).decode()}], "top_k": 2}
    (scored,) = grpcurl.call(methods["Score"], data)
    assert scored["rows"] == len(ids) - 1
    found = {name: base64.b64decode(scored[name]) for name in ("token_logprobs", "top_token_ids")}
    body = {"sequences": [ids], "top_k": 2}
    (truth,) = httpx.post(f"{teacher.http}/v1/score", json=body, timeout=60).json()["sequences"]
    np.testing.assert_array_equal(np.frombuffer(found["token_logprobs"], "<f4"), np.float32(truth["token_logprobs"]))
    np.testing.assert_array_equal(np.frombuffer(found["top_token_ids"], "<i4"), np.ravel(truth["top_token_ids"]))


def test_a_refusal_has_its_status_and_its_words(grpcurl: Grpcurl) -> None:
    score = grpcurl.describe(SERVICE).methods_by_name["Score"]
    with pytest.raises(grpc.RpcError) as refused:
        grpcurl.call(score, {"sequences": [{"token_ids": base64.b64encode(np.array([1], "<i4").tobytes()).decode()}]})
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at least 2 tokens" in refused.value.details()
