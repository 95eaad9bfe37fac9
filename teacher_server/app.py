"""One server process: both transports on one event loop, the backend behind them, from the first bind to the last call.

`/health` answers from the start, `/ready` while the engine runs. SIGTERM or SIGINT lets calls in progress end, and so
does an engine that is given up; the exit code is then 1. It knows no message and no engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn

from teacher_server.auth import Authenticator, TrustingAuthenticator
from teacher_server.backends.base import Backend
from teacher_server.backends.supervisor import EngineState, Supervised
from teacher_server.config import ServerConfig
from teacher_server.metrics import Metrics
from teacher_server.service import ServiceSettings, TeacherService
from teacher_server.transports.grpc_transport import GrpcTransport
from teacher_server.transports.http_app import create_app
from teacher_server.transports.http_transport import Http

log = logging.getLogger(__name__)

FLUSH_S = 5.0
"""Seconds in which answers that are complete may still leave their sockets."""


class StartError(Exception):
    """The server cannot start; the text is one line for the operator."""


class _Uvicorn(uvicorn.Server):
    """A uvicorn that leaves signals to the application."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class App:
    """A server that `run` starts, serves and stops. Make it on the event loop that runs it."""

    def __init__(
        self,
        config: ServerConfig,
        make_backend: Callable[[], Backend],
        authenticator: Authenticator | None = None,
    ) -> None:
        self._config = config
        self._make_backend = make_backend
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        mib = 1 << 20
        settings = ServiceSettings(
            config.queue_tokens, config.queue_sequences, config.cache, config.cache_mib * mib, config.hidden_mib * mib
        )
        self.service = TeacherService(settings, Metrics())
        authenticator = authenticator or TrustingAuthenticator()
        limit = config.max_request_mib * mib
        self._grpc = GrpcTransport(
            self.service, authenticator, max_message_bytes=config.max_message_mib * mib, max_request_bytes=limit
        )
        self._http = _Uvicorn(
            uvicorn.Config(
                create_app(Http(self.service, authenticator, limit)),
                log_config=None,
                access_log=False,
                lifespan="off",
                timeout_graceful_shutdown=int(FLUSH_S),
            )
        )
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        self.left_behind = False
        """Whether a thread of an engine may still run that could not be stopped; the process must end without it."""
        self.grpc_address = ""
        """host:port once bound."""
        self.http_address = ""
        """http://host:port once bound."""

    def stop(self) -> None:
        """Begins to drain; a second call gives up what is still in progress."""
        (self._hurry if self._stopping.is_set() else self._stopping).set()

    async def run(self) -> int:
        """Serves until `stop`, then 0, or until the engine is given up, then 1; StartError where it cannot begin."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):  # not in the main thread
                self._loop.add_signal_handler(number, self.stop)
        listener = _listen(self._config.host, self._config.http_port)
        engine = Supervised(self._make_backend, self._config.restart_policy(), self._on_state)
        try:
            host = f"[{self._config.host}]" if ":" in self._config.host else self._config.host
            try:
                grpc_port = await self._grpc.start(self._config.host, self._config.grpc_port)
            except OSError as error:
                raise StartError(str(error)) from error
            self.grpc_address = f"{host}:{grpc_port}"
            self.http_address = f"http://{host}:{listener.getsockname()[1]}"
            log.info("gRPC on %s, HTTP on %s; loading %s", self.grpc_address, self.http_address, self._config.model)
            web = asyncio.create_task(self._http.serve([listener]))
            try:
                if await self._load(engine):
                    await self._serve(engine)
            finally:
                await self._shut(web)
        finally:
            listener.close()
            await engine.close()
            self.left_behind |= engine.left_behind
        return 1 if engine.gave_up else 0

    async def _load(self, engine: Supervised) -> bool:
        """Whether the engine runs; False where `stop` came first."""
        loading = asyncio.create_task(self._start(engine))
        stopping = asyncio.create_task(self._stopping.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not loading.done():
            loading.cancel()
            await asyncio.wait({loading}, timeout=FLUSH_S)
            log.info("stopped while loading")
            return False
        loading.result()
        return True

    async def _start(self, engine: Supervised) -> None:
        try:
            await engine.start()
        except (ValueError, OSError, ImportError, MemoryError) as error:
            log.debug("loading failed", exc_info=True)
            raise StartError(f"cannot load {self._config.model}: {_one_line(error)}") from error
        except Exception as error:
            log.exception("loading failed")
            raise StartError(f"cannot load {self._config.model}: {type(error).__name__}: {_one_line(error)}") from error

    async def _serve(self, engine: Supervised) -> None:
        self.service.attach(engine)
        self._grpc.set_serving(await engine.healthy())
        log.info("ready: gRPC %s  HTTP %s", self.grpc_address, self.http_address)
        with self._ready_file():
            report = asyncio.create_task(self._report_health(engine))
            await self._stopping.wait()
            report.cancel()
            if engine.gave_up:
                log.error("%s", engine.gave_up)
            self._grpc.set_serving(False)
            self.service.drain()
            log.info("draining %d calls for at most %g s", self.service.open_calls, self._config.grace_s)
            await self._drain()

    async def _drain(self) -> None:
        """Returns when every call has ended, the grace period is over, or `stop` was called again."""
        waits = {asyncio.create_task(self.service.drained()), asyncio.create_task(self._hurry.wait())}
        await asyncio.wait(waits, timeout=self._config.grace_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.service.open_calls:
            log.warning("giving up %d calls", self.service.open_calls)
            self.service.give_up()

    async def _shut(self, web: asyncio.Task[None]) -> None:
        self._http.should_exit = True
        await asyncio.gather(self._grpc.stop(FLUSH_S), web)

    def _on_state(self, state: EngineState) -> None:
        if state is EngineState.STARTING:
            self.service.metrics.engine_restarts.inc()
        if state is EngineState.GIVEN_UP:
            self._stopping.set()
        self._changed.set()

    async def _report_health(self, engine: Supervised) -> None:
        """Keeps grpc.health.v1 equal to what /ready says."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            self.service.measure()
            self._grpc.set_serving(await engine.healthy())

    @contextlib.contextmanager
    def _ready_file(self) -> Iterator[None]:
        """Writes the addresses atomically, and takes the file away at the end."""
        if self._config.ready_file is None:
            yield
            return
        path = Path(self._config.ready_file)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        content = {"grpc": self.grpc_address, "http": self.http_address, "pid": os.getpid()}
        try:
            part.write_text(json.dumps(content) + "\n", encoding="utf-8")
            part.replace(path)
        except OSError as error:
            raise StartError(f"cannot write the ready file {path}: {_one_line(error)}") from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; StartError where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(f"cannot listen for HTTP on {host}:{port}: {error.strerror or error}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
