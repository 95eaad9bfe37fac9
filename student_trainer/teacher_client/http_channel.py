"""HTTP to one teacher server: one attempt of each call, protobuf bytes both ways, statuses as the error tree.

It knows neither retries nor limits. A call's body is one message; a streamed answer is a row of frames (see
`protos.codec.status`); an error before the first frame is a problem document (RFC 9457).
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from urllib.parse import urlencode

import httpx

from protos import codec, errors
from protos.head import Head
from protos.scores import CompletionDelta, GenerateRequest, ScoreRequest, Scores, TeacherInfo
from student_trainer.teacher_client.credentials import Credentials
from student_trainer.teacher_client.http_connection import HttpConnection, retry_after

PROTOBUF = "application/x-protobuf"
TIMEOUT_HEADER = "x-timeout-s"
"""Header that tells the server the seconds until this client gives the call up."""
SILENT_S = 5.0
"""Seconds after a call's deadline, of which the server knows, from which its silence means that nobody is there."""


class HttpTransport:
    """See `transport.Transport`."""

    def __init__(self, address: str, name: str = "", credentials: Credentials | None = None, host: str = "") -> None:
        self._connection = HttpConnection(address, name, credentials or Credentials(), host, SILENT_S)

    @property
    def address(self) -> str:
        """See `Transport.address`."""
        return self._connection.address

    def teacher(self, timeout_s: float) -> TeacherInfo:
        """See `Transport.teacher`."""
        with self._stream("GET", "/v1/teacher", None, timeout_s) as chunks:
            return codec.decode_teacher_bytes(b"".join(chunks))

    def score(self, request: ScoreRequest, timeout_s: float) -> list[Scores]:
        """See `Transport.score`."""
        (message,) = codec.encode_score_request(request)
        reader = codec.ScoreResponseReader(len(request.sequences))
        results: dict[int, Scores] = {}
        with self._stream("POST", "/v1/score", message.SerializeToString(), timeout_s) as chunks:
            for data in codec.unframe(chunks):
                done = reader.add_bytes(data)
                if done is not None:
                    results[done[0]] = done[1]
        if reader.missing:
            raise errors.TeacherFailed(f"the stream is broken: it ended with {reader.missing} sequences missing")
        return [results[index] for index in range(len(results))]

    def generate(self, request: GenerateRequest, timeout_s: float) -> Generator[list[CompletionDelta], None, None]:
        """See `Transport.generate`."""
        body = codec.encode_generate_request(request).SerializeToString()
        with self._stream("POST", "/v1/generate", body, timeout_s) as chunks:
            for data in codec.unframe(chunks):
                yield codec.decode_deltas_bytes(data)

    def head(self, fingerprint: str, timeout_s: float) -> Generator[Head, None, None]:
        """See `Transport.head`."""
        path = f"/v1/head?{urlencode({'fingerprint': fingerprint})}"
        with self._stream("GET", path, None, timeout_s) as chunks:
            for data in codec.unframe(chunks):
                yield codec.decode_head_bytes(data)

    def close(self) -> None:
        """See `Transport.close`."""
        self._connection.close()

    @contextmanager
    def _stream(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Iterator[Iterator[bytes]]:
        """The chunks of a successful answer; everything else raises the tree's error."""
        headers = {"accept": PROTOBUF, TIMEOUT_HEADER: f"{timeout_s:.3f}"}
        if body is not None:
            headers["content-type"] = PROTOBUF
        with self._connection.stream(method, path, body, timeout_s, headers, problem_error) as (response, chunks):
            if PROTOBUF not in response.headers.get("content-type", ""):
                address = self._connection.address
                raise errors.Unavailable(f"{address} is no teacher: it answers with no {PROTOBUF}")
            yield chunks


def problem_error(status: int, headers: httpx.Headers, body: bytes) -> errors.TeacherError:
    """The error of a problem document, or of a status alone where a proxy or another server sent it."""
    try:
        problem = json.loads(body)
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {}
    text = problem.get("detail") or body[:200].decode("utf-8", "replace") or f"HTTP status {status}"
    index = problem.get("index")
    named = problem.get("retry_after_s")
    retry_after_s = float(named) if isinstance(named, int | float) else retry_after(headers)
    return errors.from_wire(
        str(problem.get("reason", "")),
        str(text),
        http_status=status,
        retry_after_s=retry_after_s,
        index=index if isinstance(index, int) else None,
        request_id=headers.get("x-request-id", ""),
    )
