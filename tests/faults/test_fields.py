"""Every field of every request with values from anywhere, over both transports: an answer, or a refusal that says why.

The messages' fields come from their descriptors, those of JSON from the models, so that a new field is tested too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.teacher.v1 import teacher_pb2 as pb
from protos.teacher.v1 import teacher_pb2_grpc
from teacher_server.transports import openai_schemas, schemas
from tests.servers import Server, serving, theory

LONGEST = 64
METHODS = {
    "Score": pb.ScoreRequest(sequences=[pb.Sequence(token_ids=b"\1\0\0\0\2\0\0\0")], top_k=2),
    "Generate": pb.GenerateRequest(prompts=[pb.Prompt(text="ab")], sampling=pb.Sampling(max_tokens=2, top_p=1), n=1),
}
BODIES = {
    "/v1/score": (schemas.ScoreBody, {"sequences": [[1, 2, 3]], "top_k": 2}),
    "/v1/generate": (schemas.GenerateBody, {"prompts": [{"text": "ab"}], "sampling": {"max_tokens": 2}}),
    "/v1/completions": (openai_schemas.CompletionBody, {"prompt": "ab", "max_tokens": 2}),
    "/v1/chat/completions": (
        openai_schemas.ChatBody,
        {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 2},
    ),
}
STATUSES = {200: "OK", 412: "FAILED_PRECONDITION", 413: "RESOURCE_EXHAUSTED", 422: "INVALID_ARGUMENT"}
STATUSES[501] = "UNIMPLEMENTED"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A teacher with short sequences and small limits."""
    limits = {"request_tokens": 256, "top_k": 8, "candidates": 8, "sequences": 8}
    make = theory(max_sequence_tokens=LONGEST, max_request_tokens=256, max_top_k=8, max_candidates=8, max_sequences=8)
    with serving(make, limits=limits, max_request_mib=1, cache={"enabled": False}) as running:
        yield running


def scalars(field: FieldDescriptor) -> st.SearchStrategy[Any]:
    """Values of a field that is no message, its bounds and sensible ones among them."""
    kind, small = field.cpp_type, st.integers(0, 4)
    if kind == FieldDescriptor.CPPTYPE_ENUM:
        return st.integers(-1, 9)
    if kind == FieldDescriptor.CPPTYPE_BOOL:
        return st.booleans()
    if kind in (FieldDescriptor.CPPTYPE_FLOAT, FieldDescriptor.CPPTYPE_DOUBLE):
        width = 32 if kind == FieldDescriptor.CPPTYPE_FLOAT else 64
        return st.sampled_from([0.0, 0.5, 1.0]) | st.floats(width=width)
    if kind == FieldDescriptor.CPPTYPE_STRING:
        if field.type == FieldDescriptor.TYPE_BYTES:
            return st.sampled_from([b"\1\0\0\0\2\0\0\0", b""]) | st.binary(max_size=40)
        return st.sampled_from(["", "ab", "user"]) | st.text(max_size=20)
    bits = 32 if kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_UINT32) else 64
    signed = kind in (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)
    return small | st.integers(-(2 ** (bits - 1)) if signed else 0, 2 ** (bits - signed) - 1)


@st.composite
def messages(draw: st.DrawFn, good: Message, often: int = 6) -> Message:
    """A message that makes sense, with one in `often` of its fields, at any depth, set to anything its type holds."""
    made = type(good)()
    made.CopyFrom(good)
    for field in good.DESCRIPTOR.fields:
        nested, there = field.cpp_type == FieldDescriptor.CPPTYPE_MESSAGE, getattr(good, field.name)
        if nested and field.is_repeated and len(there):
            made.ClearField(field.name)
            getattr(made, field.name).extend([draw(messages(one)) for one in there])
        elif nested and not field.is_repeated and good.HasField(field.name):
            getattr(made, field.name).CopyFrom(draw(messages(there)))
        if draw(st.integers(1, often)) > 1:
            continue
        if nested:
            new = messages(field.message_type._concrete_class(), 1)
            if field.is_repeated:
                getattr(made, field.name).extend(draw(st.lists(new, min_size=1, max_size=2)))
            else:
                getattr(made, field.name).CopyFrom(draw(new))
        elif field.is_repeated:
            made.ClearField(field.name)
            getattr(made, field.name).extend(draw(st.lists(scalars(field), max_size=3)))
        else:
            setattr(made, field.name, draw(scalars(field)))
    return made


def over_grpc(channel: grpc.Channel, method: str, message: Message) -> tuple[str, str]:
    """(status, what it says) of a call with one message."""
    stub = teacher_pb2_grpc.TeacherServiceStub(channel)
    try:
        for _ in stub.Score(iter([message]), timeout=30) if method == "Score" else stub.Generate(message, timeout=30):
            pass
    except grpc.RpcError as error:
        return str(error.code().name), str(error.details())  # type: ignore[attr-defined]
    return "OK", ""


@pytest.mark.parametrize("examples", [60, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", list(METHODS))
def test_any_value_of_any_field_is_answered_alike_over_both_transports(
    server: Server, method: str, examples: int
) -> None:
    seen: set[str] = set()
    headers = {"content-type": "application/x-protobuf"}
    with grpc.insecure_channel(server.grpc) as channel, httpx.Client(base_url=server.http, timeout=60) as client:

        @settings(max_examples=examples)
        @given(message=messages(METHODS[method]))
        def ask(message: Message) -> None:
            status, text = over_grpc(channel, method, message)
            answer = client.post(f"/v1/{method.lower()}", content=message.SerializeToString(), headers=headers)
            assert STATUSES[answer.status_code] == status, (message, text, answer.text)
            if status != "OK":
                assert answer.json()["detail"] == text
            seen.add(status)

        ask()
    assert {"OK", "INVALID_ARGUMENT"} <= seen


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@pytest.mark.parametrize("examples", [4, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", list(BODIES))
def test_any_value_of_any_json_member_is_answered_or_refused_with_a_reason(
    server: Server, path: str, examples: int
) -> None:
    model, good = BODIES[path]
    with httpx.Client(base_url=server.http, timeout=60) as client:
        assert client.post(path, json=good).status_code == 200
        for name in model.model_fields:
            ask(client, path, good, name, examples)


def ask(client: httpx.Client, path: str, good: dict[str, Any], name: str, examples: int) -> None:
    """Gives one member of a body values from anywhere."""

    @settings(max_examples=examples)
    @given(value=anything)
    def one(value: Any) -> None:
        answer = client.post(path, json=good | {name: value})
        if answer.status_code != 200:
            assert answer.status_code in (404, *STATUSES), (name, value, answer.text)
            problem = answer.json()
            assert problem["detail"], (name, value)
            assert problem["status"] == answer.status_code

    one()
