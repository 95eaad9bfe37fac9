"""Real servers for tests: in this process on a thread of its own, or as `python -m teacher_server`."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc
import httpx

from teacher_server.app import App
from teacher_server.auth import Authenticator
from teacher_server.backends.base import Backend
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.theoretical_backend import Behaviour, TheoreticalBackend
from teacher_server.config import ServerConfig

ROOT = Path(__file__).resolve().parent.parent
WAIT_S = 120.0


@dataclass
class Server:
    """A server in this process."""

    app: App
    backends: list[Any]
    """Every engine that was made, the present one last."""
    grpc: str
    http: str
    loop: asyncio.AbstractEventLoop
    key: str = ""
    """A key with which metrics may be read, where the server wants one."""

    @property
    def backend(self) -> Any:
        """The present engine."""
        return self.backends[-1]

    def call(self, function: Callable[[], Any]) -> None:
        """Runs `function` on the server's loop, soon."""
        self.loop.call_soon_threadsafe(function)

    def metric(self, name: str, /, **labels: str) -> float:
        """The sum of a metric's numbers that have these labels; 0 where there is none yet."""
        text = httpx.get(f"{self.http}/metrics", headers=bearer(self.key)).text
        inside = "".join(rf'(?=[^}}]*\b{key}="{value}")' for key, value in labels.items())
        pattern = rf"^{name}{{{inside}[^}}]*}} (\S+)$" if labels else rf"^{name}(?:{{[^}}]*}})? (\S+)$"
        return sum(float(value) for value in re.findall(pattern, text, re.MULTILINE))


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key."""
    return {"authorization": f"Bearer {key}"} if key else {}


def wait_for(what: Callable[[], Any], seconds: float = WAIT_S) -> Any:
    """What `what` gives as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
    return value


@contextmanager
def serving(
    make_backend: Callable[[], Backend],
    authenticator: Authenticator | None = None,
    *,
    wait_ready: bool = True,
    key: str = "",
    **settings: Any,
) -> Iterator[Server]:
    """A server on free ports, on its own thread; at the end it is stopped and its thread has ended."""
    config = ServerConfig(**{"model": "theory", "grpc_port": 0, "http_port": 0, "grace_s": 0.0} | settings)
    made: dict[str, Any] = {}
    backends: list[Any] = []
    failure: list[BaseException] = []
    begun = threading.Event()

    def build() -> Backend:
        backends.append(make_backend())
        return cast(Backend, backends[-1])

    async def main() -> None:
        made["app"] = App(config, build, authenticator)
        made["loop"] = asyncio.get_running_loop()
        begun.set()
        await made["app"].run()

    def run() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:  # noqa: BLE001 - handed to the test's thread
            failure.append(error)
        finally:
            begun.set()

    thread = threading.Thread(target=run, name="server")
    thread.start()
    begun.wait()
    app: App = made["app"]
    try:
        wait_for(lambda: failure or app.http_address)
        if wait_ready:
            wait_for(lambda: failure or app.service.state.name == "READY")
        assert not failure, failure
        yield Server(app, backends, app.grpc_address, app.http_address, made["loop"], key)
    finally:
        if thread.is_alive():
            made["loop"].call_soon_threadsafe(app.stop)
        thread.join(WAIT_S)
        assert not thread.is_alive(), "the server did not stop"
    assert not failure, failure


def theory(behaviour: Behaviour | None = None, **options: Any) -> Callable[[], TheoreticalBackend]:
    """Makes a theoretical backend."""
    return lambda: TheoreticalBackend(BackendOptions(**{"model": "theory"} | options), behaviour)


def command(*arguments: str) -> list[str]:
    """The server's command line."""
    return [sys.executable, "-m", "teacher_server", *arguments]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment without settings of a server, with one thread for each library."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TEACHER_")}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables


@contextmanager
def process(
    tmp_path: Path, *arguments: str, seconds: float = WAIT_S, code: str = "", **variables: str
) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A server process that is ready within `seconds`, and what its ready file says.

    `code` is a program to run in place of `python -m teacher_server`, with the ready file as its argument.
    """
    ready = tmp_path / "ready.json"
    line = (
        [sys.executable, "-c", code, str(ready)]
        if code
        else command("--grpc-port", "0", "--http-port", "0", "--ready-file", str(ready), *arguments)
    )
    with (tmp_path / "log").open("w+") as log:
        running = subprocess.Popen(line, env=environment(**variables), stderr=log, stdout=log, text=True, cwd=ROOT)
        try:
            wait_for(lambda: ready.exists() or running.poll() is not None, seconds)
            assert ready.exists(), (tmp_path / "log").read_text()
            yield running, json.loads(ready.read_text())
        finally:
            running.terminate()
            running.wait(WAIT_S)


def ended(call: grpc.Call) -> str:
    """The name of a call's status, OK where it has begun to answer."""
    try:
        next(call)  # type: ignore[call-overload]
    except StopIteration:
        return "OK"
    except grpc.RpcError as error:
        return str(error.code().name)  # type: ignore[attr-defined]
    finally:
        call.cancel()
    return "OK"
