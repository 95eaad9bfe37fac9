"""HTTP connections that end in time: uvicorn's protocol with limits on heads, bodies, unread answers and connections.

uvicorn itself waits for ever for a first head, a body, and a reader. It knows no route; what it refuses itself it
answers with problem details like everybody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import uuid
from collections import Counter
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from protos.errors import Overloaded, TeacherError
from teacher_server.config_sections import LimitsConfig
from teacher_server.metrics import Metrics
from teacher_server.transports import problems
from teacher_server.transports.reading import Reading

LINGER_S = 2.0
"""Seconds in which a body that nobody wants any more may still come, so that its sender reads the answer."""
PROBE_S = 60
"""Seconds of silence after which the system asks whether a peer is still there."""


class Connections:
    """The connections there are, by address."""

    def __init__(self, limits: LimitsConfig, reading: Reading, metrics: Metrics) -> None:
        self.limits, self.reading, self.metrics = limits, reading, metrics
        self._by_address: Counter[str] = Counter()

    def enter(self, address: str) -> Overloaded | None:
        """Counts a connection; why it may not stay, where it may not."""
        self._by_address[address] += 1
        for what, found, most in (
            (f"{address} has", self._by_address[address], self.limits.connections_per_address),
            ("this server has", self._by_address.total(), self.limits.connections),
        ):
            if found > most:
                return Overloaded(
                    f"{what} {found} connections, {most} are taken; close some or retry later", retry_after_s=1.0
                )
        return None

    def leave(self, address: str) -> None:
        """Counts a connection's end."""
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]


class GuardedProtocol(H11Protocol):
    """One connection."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self._connections = connections
        self._address = ""
        self._phase = ""
        self._began = self._linger_until = 0.0
        self._received = 0
        self._refused = False
        self._timer: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio's."""
        super().connection_made(transport)
        self._address = self.client[0] if self.client else ""
        _watch_peer(transport.get_extra_info("socket"))
        refusal = self._connections.enter(self._address)
        if refusal is not None:
            self._refuse(refusal.http_status, refusal.reason, refusal.message, refusal)
            return
        self._enter("head")

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio's."""
        self._connections.leave(self._address)
        for timer in (self._timer, self._stall):
            if timer is not None:
                timer.cancel()
        self._timer = self._stall = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        if self._refused:
            return
        self._received += len(data)
        super().data_received(data)
        self._follow()

    def on_response_complete(self) -> None:
        """uvicorn's."""
        super().on_response_complete()
        self._follow()

    def pause_writing(self) -> None:
        """asyncio's: the peer does not read as fast as we write."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self._connections.limits.stall_s, self._cut)

    def resume_writing(self) -> None:
        """asyncio's."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """uvicorn's: what came is no HTTP, or its head is too long."""
        status = getattr(sys.exception(), "error_status_hint", HTTPStatus.BAD_REQUEST)
        detail = "what came is not HTTP/1.1"
        if status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            detail = f"the head of the request has more than {self._connections.limits.head_kib} KiB"
        self._refuse(status, problems.framework_reason(status), detail)

    def _follow(self) -> None:
        """Keeps the timer in step with what the peer still has to send."""
        theirs, ours = self.conn.their_state, self.conn.our_state
        if self._refused or self.transport.is_closing():
            return
        if theirs is h11.SEND_BODY:
            self._enter("linger" if ours in (h11.DONE, h11.MUST_CLOSE) else "body")
        elif theirs is h11.IDLE and (self.conn.trailing_data[0] or self._phase == "head"):
            self._enter("head")
        else:
            self._enter("")

    def _enter(self, phase: str) -> None:
        if phase == self._phase:
            return
        self._phase, self._began, self._received = phase, self.loop.time(), 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if phase:
            self._timer = self.loop.call_at(self._end(), self._look)

    def _end(self) -> float:
        """When the phase must be over."""
        if self._phase == "body":
            return self._began + self._connections.reading.seconds(self._received)
        return self._began + (LINGER_S if self._phase == "linger" else self._connections.limits.head_s)

    def _look(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        end = self._end()
        if self.loop.time() < end:
            self._timer = self.loop.call_at(end, self._look)
        elif self._phase == "head":
            self._refuse(
                HTTPStatus.REQUEST_TIMEOUT,
                HTTPStatus.REQUEST_TIMEOUT.name,
                f"the head of a request did not come in {self._connections.limits.head_s:g} s",
            )
        elif self._phase == "body" and not self.cycle.response_started:
            error = self._connections.reading.too_slow(self._received)
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, error.reason, error.message)
        else:
            self.transport.close()

    def _refuse(self, status: int, reason: str, detail: str, error: TeacherError | None = None) -> None:
        """Answers what never gets to the application, and closes."""
        self._connections.metrics.refused.labels("http", reason).inc()
        self._refused = True
        request_id = str(uuid.uuid4())
        body = problems.problem(error, request_id) if error else problems.members(status, reason, detail, request_id)
        data = json.dumps(body).encode()
        headers = [
            (b"content-type", problems.MEDIA_TYPE.encode()),
            (b"content-length", str(len(data)).encode()),
            (b"connection", b"close"),
            (b"x-request-id", request_id.encode()),
            *([(b"retry-after", b"1")] if error else []),
        ]
        with contextlib.suppress(h11.LocalProtocolError):  # an answer was under way
            phrase = HTTPStatus(status).phrase.encode()
            for event in (
                h11.Response(status_code=status, headers=headers, reason=phrase),
                h11.Data(data=data),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _cut(self) -> None:
        """Ends a connection whose peer reads nothing."""
        self._stall = None
        self._connections.metrics.refused.labels("http", "STALLED").inc()
        self.transport.abort()


def _watch_peer(sock: socket.socket | None) -> None:
    """Lets the system find out that a peer is gone without a word."""
    if sock is None:
        return
    with contextlib.suppress(OSError, AttributeError):  # not everywhere
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, PROBE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, PROBE_S // 6)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
