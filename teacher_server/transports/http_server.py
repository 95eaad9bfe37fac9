"""uvicorn on one socket, as this server wants it: no signals, no WebSockets, guarded connections, TLS from files."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from teacher_server.transports.http_protocol import Connections, GuardedProtocol
from teacher_server.transports.tls import Tls


class HttpServer(uvicorn.Server):
    """Serves `app` until `should_exit`; then answers in progress get `flush_s` seconds."""

    def __init__(self, app: ASGIApp, connections: Connections, tls: Tls | None, flush_s: float) -> None:
        config = uvicorn.Config(
            app,  # type: ignore[arg-type]
            http=GuardedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=int(flush_s),
            h11_max_incomplete_event_size=connections.limits.head_kib << 10,
        )
        config.load()
        super().__init__(config)
        self._connections, self._tls = connections, tls

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the application."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn's: listens on the sockets."""
        loop = asyncio.get_running_loop()

        def connection() -> GuardedProtocol:
            return GuardedProtocol(
                self._connections, config=self.config, server_state=self.server_state, app_state={}, _loop=loop
            )

        handshake_s = self._connections.limits.head_s if self._tls else None
        context = self._tls.http_context() if self._tls else None
        self.servers = [
            await loop.create_server(
                connection, sock=one, ssl=context, backlog=self.config.backlog, ssl_handshake_timeout=handshake_s
            )
            for one in sockets or ()
        ]
        self.started = True
