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
from typing import Any

from teacher_server.auth import Authenticator, TrustingAuthenticator
from teacher_server.backends.base import Backend
from teacher_server.backends.life import Patience
from teacher_server.backends.supervisor import EngineState, Supervised
from teacher_server.config import ServerConfig
from teacher_server.key_watch import KeyAuthenticator
from teacher_server.keys import KeyFileError
from teacher_server.listening import listening
from teacher_server.metrics import Metrics
from teacher_server.service import ServiceSettings, TeacherService
from teacher_server.traces import NO_TRACES, Traces
from teacher_server.transports.grpc_transport import GrpcTransport
from teacher_server.transports.http_app import create_app
from teacher_server.transports.http_protocol import Connections
from teacher_server.transports.http_server import HttpServer
from teacher_server.transports.http_transport import Http
from teacher_server.transports.reading import Reading
from teacher_server.transports.tls import Tls, TlsError

log = logging.getLogger(__name__)

HEALTH_S = 1.0
"""Seconds between two looks at the engine's health."""
FLUSH_S = 5.0
"""Seconds in which answers that are complete may still leave their sockets."""


class StartError(Exception):
    """The server cannot start; the text is one line for the operator."""


class App:
    """A server that `run` starts, serves and stops. Make it on the event loop that runs it.

    `on_ready()` is called once, when the engine has been loaded and before the first call is let in.
    """

    def __init__(
        self,
        config: ServerConfig,
        make_backend: Callable[[], Backend],
        authenticator: Authenticator | None = None,
        on_ready: Callable[[], object] = lambda: None,
    ) -> None:
        self._config = config
        self._on_ready = on_ready
        self._make_backend = make_backend
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        mib = 1 << 20
        settings = ServiceSettings(
            config.queue_tokens,
            config.queue_sequences,
            config.cache.enabled,
            config.cache.memory_mib * mib,
            Path(config.cache.folder) if config.cache.folder else None,
            config.cache.disk_mib * mib,
            config.hidden_mib * mib,
        )
        self._traces = _traces(config)
        self.service = TeacherService(settings, Metrics(), traces=self._traces)
        self._authenticator = authenticator or _authenticator(config)
        limits, most = config.limits, config.max_request_mib * mib
        reading = Reading(limits.reading_mib * mib, limits.body_s, limits.body_kib_per_s * 1024)
        tls = _tls(config)
        self._grpc = GrpcTransport(
            self.service,
            self._authenticator,
            limits,
            reading,
            tls=tls,
            max_message_bytes=config.max_message_mib * mib,
            max_request_bytes=most,
        )
        routes = create_app(Http(self.service, self._authenticator, most, limits, reading))
        self._http = HttpServer(routes, Connections(limits, reading, self.service.metrics), tls, FLUSH_S)
        self._scheme = "https" if tls else "http"
        self._loop = asyncio.get_running_loop()
        self._end_at = 0.0
        self._changed = asyncio.Event()
        self.left_behind = False
        """Whether a thread of an engine may still run that could not be stopped; the process must end without it."""
        self.grpc_address = ""
        """host:port once bound."""
        self.http_address = ""
        """http://host:port once bound, or https."""

    def stop(self) -> None:
        """Begins to drain; a second call gives up what is still in progress."""
        (self._hurry if self._stopping.is_set() else self._stopping).set()

    async def run(self) -> int:
        """Serves until `stop`, then 0, or until the engine is given up, then 1; StartError where it cannot begin."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):  # not in the main thread
                self._loop.add_signal_handler(number, self.stop)
        if isinstance(self._authenticator, KeyAuthenticator):
            with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):
                self._loop.add_signal_handler(signal.SIGHUP, self._authenticator.reload)
        address = _address(self._config.host)
        listener = _listen(address, self._config.http_port)
        patience = Patience(**self._config.watch.model_dump())
        engine = Supervised(self._make_backend, self._config.restart_policy(), self._on_state, patience)
        engine.observe(self.service.observe_step)
        try:
            host = f"[{address}]" if ":" in address else address
            try:
                grpc_port = await self._grpc.start(address, self._config.grpc_port)
            except OSError as error:
                raise StartError(str(error)) from error
            self.grpc_address = f"{host}:{grpc_port}"
            self.http_address = f"{self._scheme}://{host}:{listener.getsockname()[1]}"
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
            await self.service.close()
            await asyncio.to_thread(self._traces.close)
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
        try:
            await self.service.attach(engine)
        except OSError as error:
            raise StartError(f"cannot keep scores in {self._config.cache.folder}: {_one_line(error)}") from error
        self._on_ready()
        self._grpc.set_serving(await engine.healthy())
        log.info("ready: gRPC %s  HTTP %s", self.grpc_address, self.http_address)
        log.info("listening on %s", ", ".join(await asyncio.to_thread(listening)))
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
        self._end_at = self._loop.time() + self._config.grace_s
        waits = {asyncio.create_task(self.service.drained()), asyncio.create_task(self._hurry.wait())}
        await asyncio.wait(waits, timeout=self._config.grace_s, return_when=asyncio.FIRST_COMPLETED)
        for wait in waits:
            wait.cancel()
        if self.service.open_calls:
            self._end_at = 0.0
            log.warning("giving up %d calls", self.service.open_calls)
            self.service.give_up()

    async def _shut(self, web: asyncio.Task[None]) -> None:
        """Lets answers leave that are complete, for what is left of the grace period at least."""
        seconds = FLUSH_S if self._hurry.is_set() else max(FLUSH_S, self._end_at - self._loop.time())
        self._http.config.timeout_graceful_shutdown = int(seconds)
        self._http.should_exit = True
        stopped: asyncio.Future[Any] = asyncio.gather(self._grpc.stop(seconds), web)
        if not self._hurry.is_set():
            hurry: asyncio.Future[Any] = asyncio.create_task(self._hurry.wait())
            await asyncio.wait({stopped, hurry}, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
            if not stopped.done():
                self._http.force_exit = True
                await self._grpc.stop(0)
        await stopped

    def _on_state(self, state: EngineState) -> None:
        if state is EngineState.STARTING:
            self.service.metrics.engine_restarts.inc()
        if state is EngineState.GIVEN_UP:
            self._stopping.set()
        self._changed.set()

    async def _report_health(self, engine: Supervised) -> None:
        """Keeps grpc.health.v1 equal to what /ready says, and logs where that changes without a restart."""
        before = True
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), HEALTH_S)
                self._changed.clear()
                self.service.measure()
            self.service.live.sample()
            healthy = await engine.healthy()
            if healthy is not before:
                log.log(logging.INFO if healthy else logging.WARNING, "health: %s", "ready" if healthy else "not ready")
                self._grpc.set_serving(healthy)
                before = healthy

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


def _authenticator(config: ServerConfig) -> Authenticator:
    """Keys where there is a file of them; StartError where it cannot be used."""
    if config.keys_file is None:
        return TrustingAuthenticator()
    try:
        found = KeyAuthenticator(Path(config.keys_file))
    except KeyFileError as error:
        raise StartError(str(error)) from error
    if not len(found):
        log.warning(
            "%s has no key yet, so nobody may call; `python -m teacher_server keys add` makes one", config.keys_file
        )
    return found


def _traces(config: ServerConfig) -> Traces:
    """OpenTelemetry where it is configured; StartError where it is not installed."""
    if config.traces.endpoint is None:
        return NO_TRACES
    try:
        from teacher_server.otel_traces import OtelTraces
    except ImportError as error:
        raise StartError(f"traces.endpoint needs OpenTelemetry ({error}); pip install 'strong2weak[otel]'") from error
    return OtelTraces(config.traces.endpoint, config.traces.ratio)


def _tls(config: ServerConfig) -> Tls | None:
    """TLS where there is a certificate; StartError where its files cannot be used."""
    if config.tls.cert_file is None or config.tls.key_file is None:
        return None
    try:
        return Tls(config.tls.cert_file, config.tls.key_file, config.tls.client_ca_file)
    except TlsError as error:
        raise StartError(str(error)) from error


def _address(host: str) -> str:
    """The one address that a host's name means, IPv4 first, so that both ports are on the same; StartError for none."""
    if not host:
        return "0.0.0.0"
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise StartError(f"cannot listen on {host}: {error.strerror or error}") from error
    return str(min(found, key=lambda one: one[0] is not socket.AF_INET)[4][0])


def _listen(host: str, port: int) -> socket.socket:
    """A listening TCP socket; StartError where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(f"cannot listen for HTTP on {host}:{port}: {error.strerror or error}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
