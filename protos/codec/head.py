"""GetHead: the call and the streamed rows of an LM head."""

from __future__ import annotations

from protos import errors
from protos import scores as domain
from protos.codec.common import parse, to_bits, to_bytes, to_floats
from protos.head import Head, itemsize
from protos.teacher.v1 import teacher_pb2 as pb


def encode_head_request(fingerprint: str) -> pb.GetHeadRequest:
    """The message that asks for the head of the teacher with that fingerprint; "" is any."""
    return pb.GetHeadRequest(fingerprint=fingerprint)


def encode_head(part: Head) -> pb.GetHeadResponse:
    """The message of consecutive rows."""
    return pb.GetHeadResponse(
        first_row=part.first_row,
        rows=len(part.weight),
        total_rows=part.total_rows,
        hidden_size=part.hidden_size,
        dtype=part.dtype,
        weight=to_bytes(part.weight),
        bias=to_bytes(part.bias),
    )


def decode_head(message: pb.GetHeadResponse) -> Head:
    """The rows in a message; TeacherFailed where they are of a wrong size or an unknown dtype."""
    rows, width, dtype = message.rows, message.hidden_size, message.dtype
    if dtype not in domain.BITS or len(message.weight) != rows * width * itemsize(dtype):
        raise errors.TeacherFailed(
            f"the stream is broken: {len(message.weight)} bytes for [{rows}, {width}] of {dtype or 'no dtype'}"
        )
    weight = to_bits(message.weight, dtype).reshape(rows, width)
    try:
        bias = to_floats(message.bias) if message.bias else None
        return Head(weight, dtype, bias, message.first_row, message.total_rows - message.first_row - rows)
    except ValueError as error:
        raise errors.TeacherFailed(f"the stream is broken: {error}") from error


def decode_head_bytes(data: bytes) -> Head:
    """The rows in a serialised message."""
    message = pb.GetHeadResponse()
    parse(message, data)
    return decode_head(message)


class HeadReader:
    """Checks that the parts of a streamed head follow each other; `add` each in order, then `finish`.

    TeacherFailed for rows that are missing, doubled or of another kind than those before: the stream is then broken.
    """

    def __init__(self) -> None:
        self._last: Head | None = None

    def add(self, part: Head) -> Head:
        """Takes the next rows and gives them back."""
        last, expected = self._last, 0 if self._last is None else self._last.last_row
        kind = (part.total_rows, part.hidden_size, part.dtype, part.bias is None)
        if part.first_row != expected or len(part.weight) == 0:
            raise errors.TeacherFailed(f"the stream is broken: row {part.first_row} of the head out of turn")
        if last is not None and kind != (last.total_rows, last.hidden_size, last.dtype, last.bias is None):
            raise errors.TeacherFailed(f"the stream is broken: row {part.first_row} of the head is of another kind")
        self._last = part
        return part

    def finish(self) -> None:
        """Takes the end of the stream."""
        if self._last is None or self._last.last_row != self._last.total_rows:
            have = 0 if self._last is None else self._last.last_row
            raise errors.TeacherFailed(f"the stream is broken: it ended after {have} rows of the head")
