"""Runs an App in this process: logging, the event loop, and one line where it cannot start."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import sys
from collections.abc import Callable

from teacher_server.app import App, StartError
from teacher_server.backends.base import Backend
from teacher_server.config import ServerConfig
from teacher_server.leftovers import end_processes
from teacher_server.logs import JsonLines, PlainLines, name_request
from teacher_server.settings import render

log = logging.getLogger(__name__)

FILES = 65_536
"""Open files that are enough."""
LEFTOVERS_S = 10.0
"""Seconds that processes of an engine get to end when its start was interrupted."""


def run(config: ServerConfig, make: Callable[[], Backend] | None = None) -> int:
    """The exit code of a server that ran to its end, on the backend that the settings name or that `make` gives."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if config.log_format == "json" else PlainLines())
    handler.addFilter(name_request)
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler])
    for noisy in ("httpx", "httpcore", "urllib3", "filelock", "uvicorn"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, logging.getLogger().level))
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # else anybody's nonsense is a line of the log
    allow_many_files()
    log.info("settings: %s", "; ".join(render(config).splitlines()))

    def make_backend() -> Backend:
        from teacher_server.backends.factory import make_backend

        return make_backend(config.backend_options())

    async def serve() -> int:
        app = App(config, make or make_backend, on_ready=spare_the_collector)
        try:
            code = await app.run()
        except StartError as error:
            if not app.left_behind:
                raise
            code = report(error)
        if app.left_behind:  # such a thread would be waited for, and there is nothing to lose
            await asyncio.to_thread(end_processes, LEFTOVERS_S)
            logging.shutdown()
            os._exit(code)
        return code

    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(serve())
    except StartError as error:
        return report(error)


def spare_the_collector() -> None:
    """Takes all that was made so far out of garbage collection: it stays, and a walk over it stops every call for 60 to
    300 ms (seen as the slowest refusals of benchmarks/load.py).
    """
    gc.collect()
    gc.freeze()


def report(error: StartError) -> int:
    """Says why the server does not start; the exit code."""
    print(f"teacher_server: {error}", file=sys.stderr, flush=True)
    return 1


def allow_many_files() -> None:
    """Lets this process open enough files, of which connections are some, as far as the system allows it to."""
    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = FILES if most == resource.RLIM_INFINITY else min(FILES, most)
    if now != resource.RLIM_INFINITY and now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's where it is installed, else asyncio's."""
    try:
        import uvloop
    except ModuleNotFoundError:
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
