"""The parser without copies reads what protobuf writes, and refuses what is no message."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import codec, errors
from protos.codec.wire import fields
from protos.teacher.v1 import teacher_pb2 as pb

DESCRIPTOR = pb.ScoreResponse.DESCRIPTOR
NAMES = {field.number: field.name for field in DESCRIPTOR.fields}
values = {
    field.name: st.binary(max_size=300) if field.type == field.TYPE_BYTES else st.integers(0, 2**32 - 1)
    for field in DESCRIPTOR.fields
}


@given(st.fixed_dictionaries(values), st.fixed_dictionaries(values))
def test_it_reads_what_protobuf_reads_also_where_fields_come_twice(one: dict, two: dict) -> None:
    data = pb.ScoreResponse(**one).SerializeToString() + pb.ScoreResponse(**two).SerializeToString()
    message = pb.ScoreResponse.FromString(data)
    numbers, parts = fields(data, NAMES)
    for name in values:
        got = numbers.get(name, 0) if isinstance(one[name], int) else bytes(parts.get(name, b""))
        assert got == getattr(message, name)


def test_fields_that_it_does_not_know_are_skipped() -> None:
    message = pb.ScoreResponse(index=5, token_logprobs=b"1234")
    others = bytes([0xF8, 0x7F, 0x96, 0x01]) + bytes([0xF9, 0x7F]) + b"8" * 8 + bytes([0xFD, 0x7F]) + b"4" * 4
    numbers, parts = fields(others + message.SerializeToString() + others, NAMES)
    assert numbers == {"index": 5}
    assert {name: bytes(part) for name, part in parts.items()} == {"token_logprobs": b"1234"}


@pytest.mark.parametrize(
    "data",
    [b"\x08", b"\x2a\x05abc", b"\x0b", b"\x08" + b"\xff" * 11, b"\x09123", b"\x2a\xff\xff\xff\xff\x0f"],
    ids=["number cut", "bytes cut", "group", "endless number", "fixed cut", "huge length"],
)
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="byte"):
        fields(data, NAMES)
    with pytest.raises(errors.TeacherFailed, match="the stream is broken"):
        codec.ScoreResponseReader(1).add_bytes(data)
