"""Errors as google.rpc.Status and back, and the framing of messages in an HTTP stream."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from protos import errors

GRPC_NUMBERS = {
    "INVALID_ARGUMENT": 3,
    "DEADLINE_EXCEEDED": 4,
    "PERMISSION_DENIED": 7,
    "RESOURCE_EXHAUSTED": 8,
    "FAILED_PRECONDITION": 9,
    "UNIMPLEMENTED": 12,
    "INTERNAL": 13,
    "UNAVAILABLE": 14,
    "UNAUTHENTICATED": 16,
}
"""Numbers of google.rpc.Code for the names in the error table."""


def encode_error(error: errors.TeacherError) -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo (reason, domain, index) and RetryInfo where there is a delay."""
    status = status_pb2.Status(code=GRPC_NUMBERS[error.grpc_code], message=error.message)
    metadata = {} if error.index is None else {"index": str(error.index)}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=errors.DOMAIN, metadata=metadata)
    status.details.add().Pack(info)
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return status


def decode_error(status: status_pb2.Status, grpc_code: str = "") -> errors.TeacherError:
    """The error in a google.rpc.Status; `grpc_code` is the call's own status name, for servers without details."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after_s: float | None = None
    for detail in status.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    index = info.metadata.get("index", "")
    return errors.from_wire(
        info.reason,
        status.message,
        grpc_code=grpc_code,
        retry_after_s=retry_after_s,
        index=int(index) if index.isdigit() else None,
    )


def frame(data: bytes) -> bytes:
    """One message of an HTTP stream: its length as a little-endian uint32, then its bytes."""
    return len(data).to_bytes(4, "little") + data


def unframe(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The messages of an HTTP stream, however its bytes were cut into chunks; TeacherFailed where it ends early."""
    buffer = bytearray()
    for chunk in chunks:
        buffer += chunk
        while len(buffer) >= 4 and len(buffer) >= 4 + (size := int.from_bytes(buffer[:4], "little")):
            yield bytes(buffer[4 : 4 + size])
            del buffer[: 4 + size]
    if buffer:
        raise errors.TeacherFailed(f"the stream is broken: it ended {len(buffer)} bytes into a message")
