"""Errors as google.rpc.Status and back, and the framing of messages in an HTTP stream.

A stream is a row of frames: a little-endian uint32 length word, then that many bytes. The word's high bit marks an
error frame: a google.rpc.Status, always the last frame, by which a stream that began with status 200 ends in an error
of the tree. `frame` and `frame_error` write, `FrameReader` and `unframe` read; readers raise the error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from protos import errors
from protos.codec.common import parse

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


def encode_error(error: errors.TeacherError, request_id: str = "") -> status_pb2.Status:
    """google.rpc.Status with ErrorInfo (reason, domain, index), RequestInfo, and RetryInfo where there is a delay."""
    status = status_pb2.Status(code=GRPC_NUMBERS[error.grpc_code], message=error.message)
    metadata = {} if error.index is None else {"index": str(error.index)}
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=errors.DOMAIN, metadata=metadata)
    status.details.add().Pack(info)
    if error.retry_after_s is not None:
        delay = Duration()
        delay.FromMilliseconds(round(error.retry_after_s * 1000))
        status.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    if request_id:
        status.details.add().Pack(error_details_pb2.RequestInfo(request_id=request_id))
    return status


def decode_error(status: status_pb2.Status, grpc_code: str = "") -> errors.TeacherError:
    """The error in a google.rpc.Status; `grpc_code` is the call's own status name, for servers without details."""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    request = error_details_pb2.RequestInfo()
    retry_after_s: float | None = None
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(request)
        if detail.Unpack(retry):
            retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
    index = info.metadata.get("index", "")
    return errors.from_wire(
        info.reason,
        status.message,
        grpc_code=grpc_code,
        retry_after_s=retry_after_s,
        index=int(index) if index.isdigit() else None,
        request_id=request.request_id,
    )


ERROR_FRAME = 1 << 31
"""Bit of a frame's length word which says that the frame is a google.rpc.Status and the stream's last one."""
MAX_FRAME_BYTES = 64 * 1024 * 1024
"""Longest frame that a reader accepts; a longer length word is a broken stream, not memory to reserve."""


def frame(data: bytes) -> bytes:
    """One message of an HTTP stream: its length as a little-endian uint32 below 2**31, then its bytes."""
    assert len(data) <= MAX_FRAME_BYTES
    return len(data).to_bytes(4, "little") + data


def frame_error(error: errors.TeacherError, request_id: str = "") -> bytes:
    """The last frame of a stream that fails after it began, when the HTTP status 200 has been sent already.

    Its length word has the bit `ERROR_FRAME` set; the bytes are `encode_error(error)` serialised. An error before the
    first frame is no frame: it is the HTTP status and its problem details.
    """
    data: bytes = encode_error(error, request_id).SerializeToString()
    return (len(data) | ERROR_FRAME).to_bytes(4, "little") + data


class FrameReader:
    """Cuts an HTTP stream into messages, however its bytes were cut into chunks; for callers that push bytes.

    `add` returns the messages that a chunk completes and raises the error of an error frame as the tree's own class,
    after which the stream is over. `finish` raises TeacherFailed where the stream ended inside a frame. Messages that
    are missing altogether are for the call's own reader to notice (`ScoreResponseReader.missing`, finish reasons).
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._error: errors.TeacherError | None = None

    def add(self, chunk: bytes) -> list[bytes]:
        """The messages that `chunk` completes, in order."""
        if self._error is not None:
            raise self._error
        buffer = self._buffer
        messages: list[bytes] = []
        buffer += chunk
        start = 0
        while len(buffer) - start >= 4:
            word = int.from_bytes(buffer[start : start + 4], "little")
            end = start + 4 + (word & ~ERROR_FRAME)
            if end - start - 4 > MAX_FRAME_BYTES:
                raise errors.TeacherFailed(f"the stream is broken: a message of {end - start - 4} bytes is announced")
            if len(buffer) < end:
                break
            data = bytes(buffer[start + 4 : end])
            start = end
            if word & ERROR_FRAME:
                status = status_pb2.Status()
                parse(status, data)
                self._error = decode_error(status)
                if messages:  # they are handed out first; the next call raises
                    break
                raise self._error
            messages.append(data)
        del buffer[:start]
        return messages

    def finish(self) -> None:
        """Takes the end of the stream."""
        if self._error is not None:
            raise self._error
        if self._buffer:
            raise errors.TeacherFailed(f"the stream is broken: it ended {len(self._buffer)} bytes into a message")


def unframe(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The messages of an HTTP stream, for callers that pull; raises what `FrameReader` raises."""
    reader = FrameReader()
    for chunk in chunks:
        yield from reader.add(chunk)
    reader.finish()
