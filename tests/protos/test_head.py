"""An LM head survives the wire however it is cut, broken streams of it are noticed, and its bits mean what they say."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos import codec, errors, head
from protos.head import Head
from protos.teacher.v1 import teacher_pb2 as pb
from tests.protos.strategies import heads, same


def parts_of(value: Head, rows: int) -> list[Head]:
    reader = codec.HeadReader()
    messages = [codec.encode_head(part).SerializeToString() for part in value.parts(rows)]
    parts = [reader.add(codec.decode_head_bytes(data)) for data in messages]
    reader.finish()
    return parts


@given(heads(), st.integers(1, 25))
def test_a_head_survives_however_many_messages_it_takes(value: Head, rows: int) -> None:
    parts = parts_of(value, rows)
    assert all(len(part.weight) <= rows and part.total_rows == len(value.weight) for part in parts)
    bias = None if value.bias is None else np.concatenate([p.bias for p in parts if p.bias is not None])
    assert same(Head(np.concatenate([p.weight for p in parts]), value.dtype, bias), value)


def test_a_message_of_rows_stays_within_a_mebibyte() -> None:
    for width in (64, 4096, 12_288):
        rows = head.rows_per_message(width)
        part = Head(np.zeros((rows, width), np.float32), "float32", np.zeros(rows, np.float32))
        assert 2**20 - 4 * width <= part.weight.nbytes <= 2**20
        assert codec.encode_head(part).ByteSize() < 1.05 * 2**20
    assert head.rows_per_message(2**20) == 1


@pytest.mark.parametrize("fault", ["missing", "doubled", "early", "kind", "short", "dtype", "bias", "nothing"])
def test_a_broken_stream_of_a_head_is_noticed(fault: str) -> None:
    value = Head(np.arange(24, dtype=np.float32).reshape(6, 4), "float32", np.zeros(6, np.float32))
    messages = [codec.encode_head(part) for part in value.parts(2)]
    if fault == "missing":
        del messages[1]
    elif fault == "doubled":
        messages.insert(1, messages[0])
    elif fault == "early":
        messages.pop()
    elif fault == "kind":
        messages[1].bias = b""
    elif fault == "short":
        messages[1].weight = b"1234"
    elif fault == "dtype":
        messages[1].dtype = "float8"
    elif fault == "bias":
        messages[1].bias = b"1234"
    else:
        messages = []
    with pytest.raises(errors.TeacherFailed, match="the stream is broken"):
        read(messages)


def read(messages: list[pb.GetHeadResponse]) -> None:
    reader = codec.HeadReader()
    for message in messages:
        reader.add(codec.decode_head(message))
    reader.finish()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Head(np.zeros((2, 2), np.float32), "bfloat16"), r"must be uint16\[R,H\], got float32\[2, 2\]"),
        (lambda: Head(np.zeros((2, 2), np.float32), "int8"), "one of bfloat16, float16, float32, got 'int8'"),
        (
            lambda: Head(np.zeros((2, 2), np.float32), "float32", np.zeros(3, np.float32)),
            r"float32\[2\], got float32\[3\]",
        ),
        (lambda: Head(np.zeros((2, 2), np.float32), "float32", None, 3, -1), "rows 3 to 5 are not within 4 rows"),
    ],
)
def test_a_head_that_cannot_be_meant_is_refused(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bits_widen_to_the_numbers_that_torch_holds(dtype: torch.dtype) -> None:
    numbers = torch.randn(50, 3).to(dtype)
    name = str(dtype).removeprefix("torch.")
    bits = numbers.numpy() if dtype is torch.float32 else numbers.view(torch.int16).numpy().view(np.uint16)
    assert bits.dtype == head.held_as(name)
    assert (head.widened(bits, name) == numbers.float().numpy()).all()
    logits = head.logits(bits, name, Head(bits, name, np.ones(50, np.float32)))
    assert np.allclose(logits, (numbers.float() @ numbers.float().T + 1).numpy(), atol=1e-5)
