"""HTTP to one teacher server: one attempt of each call, protobuf bytes both ways, statuses as the error tree.

It knows neither retries nor limits. A call's body is one message; a streamed answer is a row of frames (see
`protos.codec.status`); an error before the first frame is a problem document (RFC 9457).
"""

from __future__ import annotations

import json
import socket
import time
import weakref
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlencode

import httpx

from protos import codec, errors
from protos.head import Head
from protos.scores import CompletionDelta, GenerateRequest, ScoreRequest, Scores, TeacherInfo
from student_trainer.teacher_client import tracing
from student_trainer.teacher_client.credentials import Credentials, Key
from student_trainer.teacher_client.transport import CLIENT_HEADER, is_loopback

PROTOBUF = "application/x-protobuf"
TIMEOUT_HEADER = "x-timeout-s"
"""Header that tells the server the seconds until this client gives the call up."""
CONNECT_S = 20.0
SILENT_S = 5.0
"""Seconds after a call's deadline, of which the server knows, from which its silence means that nobody is there."""


class HttpTransport:
    """See `transport.Transport`."""

    def __init__(self, address: str, name: str = "", credentials: Credentials | None = None, host: str = "") -> None:
        credentials = credentials or Credentials()
        self._address = address
        self._key = Key(credentials)
        self._closed = False
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        headers = {"accept": PROTOBUF, **({CLIENT_HEADER: name} if name else {})}
        self._extensions: dict[str, Any] = {"trace": self._trace}
        if host:
            port = httpx.URL(address).port
            headers["host"] = f"{host}:{port}" if port else host
            self._extensions["sni_hostname"] = host
        self._client = httpx.Client(
            base_url=address.rstrip("/"),
            headers=headers,
            verify=credentials.context() if credentials.of_tls else True,
            trust_env=not is_loopback(httpx.URL(address).host),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )

    @property
    def address(self) -> str:
        """See `Transport.address`."""
        return self._address

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
        """See `Transport.close`; sockets are shut down first, so that threads that read from them wake up."""
        self._closed = True
        for sock in list(self._sockets):
            _shut_down(sock)
        self._client.close()

    def _trace(self, event: str, info: dict[str, Any]) -> None:
        """httpcore's trace: remembers sockets as they are connected, so that `close` can end reads in other threads."""
        if event == "connection.connect_tcp.complete":
            sock = info["return_value"].get_extra_info("socket")
            if sock is not None:
                self._sockets.add(sock)
            if self._closed and sock is not None:
                _shut_down(sock)

    @contextmanager
    def _stream(self, method: str, path: str, body: bytes | None, timeout_s: float) -> Iterator[Iterator[bytes]]:
        """The chunks of a successful answer; everything else raises the tree's error."""
        end = time.monotonic() + timeout_s
        headers = {TIMEOUT_HEADER: f"{timeout_s:.3f}", **dict(self._key.headers()), **dict(tracing.headers())}
        if body is not None:
            headers["content-type"] = PROTOBUF
        timeout = httpx.Timeout(timeout_s + SILENT_S, connect=min(CONNECT_S, timeout_s))
        try:
            with self._client.stream(
                method, path, content=body, headers=headers, timeout=timeout, extensions=self._extensions
            ) as response:
                if response.status_code != 200:
                    raise problem_error(response.status_code, response.headers, response.read())
                if PROTOBUF not in response.headers.get("content-type", ""):
                    raise errors.Unavailable(f"{self._address} is no teacher: it answers with no {PROTOBUF}")
                yield self._until(end, response, timeout_s)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            what = f"the connection to {self._address} is dead: not a byte for {timeout_s + SILENT_S:.4g} s"
            raise errors.Unavailable(what) from error
        except (httpx.HTTPError, httpx.StreamError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not self._closed:
                raise
            what = "the connection to {0} was closed" if self._closed else "no teacher answers at {0}: {1}"
            raise errors.Unavailable(what.format(self._address, error or type(error).__name__)) from error

    def _until(self, end: float, response: httpx.Response, timeout_s: float) -> Iterator[bytes]:
        for chunk in response.iter_bytes():
            if time.monotonic() > end:
                raise errors.DeadlineExceeded(f"no whole answer from {self._address} within {timeout_s:.4g} s")
            yield chunk


def _shut_down(sock: socket.socket) -> None:
    """Ends a connection for whoever reads from it; nothing where the other side was faster."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


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
    retry_after = problem.get("retry_after_s", headers.get("retry-after"))
    try:
        retry_after_s = None if retry_after is None else float(retry_after)
    except ValueError:  # a date, which teachers do not send
        retry_after_s = None
    return errors.from_wire(
        str(problem.get("reason", "")),
        str(text),
        http_status=status,
        retry_after_s=retry_after_s,
        index=index if isinstance(index, int) else None,
        request_id=headers.get("x-request-id", ""),
    )
