"""What the codec's modules share: bytes to arrays and back, and parsing with a clear error."""

from __future__ import annotations

import numpy as np
from google.protobuf.message import DecodeError, Message

from protos import errors
from protos import scores as domain
from protos.teacher.v1 import teacher_pb2 as pb

MODES = {domain.Mode.THINKING: pb.MODE_THINKING, domain.Mode.NON_THINKING: pb.MODE_NON_THINKING}
MODES_BACK = {number: mode for mode, number in MODES.items()}
FIELDS = {
    domain.Field.TOKEN_LOGPROBS: pb.FIELD_TOKEN_LOGPROBS,
    domain.Field.TOP: pb.FIELD_TOP,
    domain.Field.CANDIDATE_LOGPROBS: pb.FIELD_CANDIDATE_LOGPROBS,
    domain.Field.LOG_NORMALIZER: pb.FIELD_LOG_NORMALIZER,
    domain.Field.TAIL_LOGPROB: pb.FIELD_TAIL_LOGPROB,
    domain.Field.HIDDEN_STATES: pb.FIELD_HIDDEN_STATES,
}
FIELDS_BACK = {number: name for name, number in FIELDS.items()}
FINISH = {domain.FinishReason.STOP: pb.FINISH_REASON_STOP, domain.FinishReason.LENGTH: pb.FINISH_REASON_LENGTH}
FINISH_BACK = {number: reason for reason, number in FINISH.items()}


def to_ids(data: bytes, what: str, index: int | None = None) -> domain.Ids:
    """int32[len/4] of little-endian bytes; InvalidSequence for another length."""
    if len(data) % 4:
        raise errors.InvalidSequence(f"{what} has {len(data)} bytes, not a multiple of 4 (int32)", index=index)
    return np.frombuffer(data, dtype="<i4").astype(np.int32, copy=False)


def to_floats(data: bytes) -> domain.Floats:
    """float32[len/4] of little-endian bytes."""
    return np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)


def to_bits(data: bytes, dtype: str) -> domain.Bits:
    """Numbers of a named dtype, as what holds them (see `scores.BITS`)."""
    held = np.dtype(domain.BITS[dtype])
    return np.frombuffer(data, dtype=held.newbyteorder("<")).astype(held, copy=False)


def to_bytes(array: domain.Ids | domain.Floats | domain.Bits | None) -> bytes:
    """Row-major little-endian bytes; none for None."""
    if array is None:
        return b""
    return np.ascontiguousarray(array, dtype={"i": "<i4", "f": "<f4", "u": "<u2"}[array.dtype.kind]).tobytes()


def parse(message: Message, data: bytes) -> None:
    """Fills `message` from its serialised form; InvalidRequest where the bytes are another thing."""
    try:
        message.ParseFromString(data)
    except DecodeError as error:
        name = type(message).__name__
        raise errors.InvalidRequest(f"the body of {len(data)} bytes is not a teacher.v1.{name} message") from error
