"""HTTP connections to one server: a call's deadline, its proxies and TLS, and an end that wakes up whoever reads.

It knows no route and no body; what an answer means is for the transport that asked.
"""

from __future__ import annotations

import socket
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import httpx

from protos import errors
from student_trainer.teacher_client import tracing
from student_trainer.teacher_client.credentials import Credentials, Key
from student_trainer.teacher_client.transport import CLIENT_HEADER, is_loopback

CONNECT_S = 20.0

Failure = Callable[[int, httpx.Headers, bytes], errors.TeacherError]
"""(status, headers, body) of an answer that is no success -> its error."""


class HttpConnection:
    """Connections to the server at `address`; thread-safe.

    `name` is sent with every call. `host` is the name of a server whose address is one of several that the name has.
    `silent_s` are the seconds after a call's deadline from which the silence of a server that was told the deadline
    means that nobody is there (Unavailable); None is for servers that know no deadline: DeadlineExceeded then.
    """

    def __init__(
        self, address: str, name: str, credentials: Credentials, host: str, silent_s: float | None = None
    ) -> None:
        self.address = address
        self._silent_s = silent_s
        self._key = Key(credentials)
        self._closed = False
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        headers = {CLIENT_HEADER: name} if name else {}
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

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        body: bytes | None,
        timeout_s: float,
        headers: Mapping[str, str],
        failure: Failure,
    ) -> Iterator[tuple[httpx.Response, Iterator[bytes]]]:
        """A successful answer and its chunks; `failure` makes the error of any other answer."""
        end = time.monotonic() + timeout_s
        headers = {**headers, **dict(self._key.headers()), **dict(tracing.headers())}
        timeout = httpx.Timeout(timeout_s + (self._silent_s or 0), connect=min(CONNECT_S, timeout_s))
        try:
            with self._client.stream(
                method, path, content=body, headers=headers, timeout=timeout, extensions=self._extensions
            ) as response:
                if response.status_code != 200:
                    raise failure(response.status_code, response.headers, response.read())
                yield response, self._until(end, response, timeout_s)
        except (httpx.ReadTimeout, httpx.WriteTimeout) as error:
            if self._silent_s is None:
                raise errors.DeadlineExceeded(f"no answer from {self.address} within {timeout_s:.4g} s") from error
            what = f"the connection to {self.address} is dead: not a byte for {timeout_s + self._silent_s:.4g} s"
            raise errors.Unavailable(what) from error
        except (httpx.HTTPError, httpx.StreamError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not self._closed:
                raise
            what = "the connection to {0} was closed" if self._closed else "no teacher answers at {0}: {1}"
            raise errors.Unavailable(what.format(self.address, error or type(error).__name__)) from error

    def close(self) -> None:
        """Ends calls in flight; sockets are shut down first, so that threads that read from them wake up."""
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

    def _until(self, end: float, response: httpx.Response, timeout_s: float) -> Iterator[bytes]:
        for chunk in response.iter_bytes():
            if time.monotonic() > end:
                raise errors.DeadlineExceeded(f"no whole answer from {self.address} within {timeout_s:.4g} s")
            yield chunk


def _shut_down(sock: socket.socket) -> None:
    """Ends a connection for whoever reads from it; nothing where the other side was faster."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def retry_after(headers: httpx.Headers) -> float | None:
    """Seconds of a Retry-After header; None where there is none or it is a date."""
    try:
        return float(headers["retry-after"]) if "retry-after" in headers else None
    except ValueError:
        return None
