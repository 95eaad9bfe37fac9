"""Processes that the benchmark starts and ends: servers in groups of their own, and what they cost in CPU time.

CPU times come from Linux's /proc. It ends what it started and nothing else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
END_S = 30.0
TAIL_LINES = 15


class Failed(RuntimeError):
    """A process did not do what it should; the message ends with the last lines of its log."""


def environment() -> dict[str, str]:
    """This process's environment without settings of a server, with the project importable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TEACHER_")}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH", "")]))
    return kept | {"PYTHONPATH": path, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


@contextmanager
def running(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`python ARGUMENTS` in a group of its own; the whole group has ended at the end."""
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment(),
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of the group, an engine that still holds its GPU for instance, and waits until it is gone."""
    end = time.monotonic() + END_S
    while any(p.group == process.pid and not p.ended for p in _all().values()) and time.monotonic() < end:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    process.wait(END_S)


def wait(process: subprocess.Popen[bytes], log: Path, done: Callable[[], bool], seconds: float, what: str) -> None:
    """Returns once `done`; Failed where the process ends before that or `seconds` pass."""
    end = time.monotonic() + seconds
    while not done():
        code = process.poll()
        if code is not None and not done():
            raise Failed(f"{what} ended with exit code {code}:\n{tail(log)}")
        if time.monotonic() > end:
            raise Failed(f"{what} was not there after {seconds:.0f} s:\n{tail(log)}")
        time.sleep(0.05)


def tail(log: Path) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text("utf-8", "replace").splitlines()[-TAIL_LINES:])


@dataclass(frozen=True)
class _Process:
    parent: int
    group: int
    ended: bool
    """Whether it only waits for its parent to notice its end."""
    cpu_s: float


def _all() -> dict[int, _Process]:
    """Every process of this machine by its id, from /proc/PID/stat (proc(5) numbers its fields)."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                state, *fields = (folder / "stat").read_text().rpartition(")")[2].split()
                cpu_s = (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")
                found[int(folder.name)] = _Process(int(fields[0]), int(fields[1]), state in "ZX", cpu_s)
    return found


def cpu_seconds(pid: int) -> tuple[float, float]:
    """CPU seconds of a process so far, and of all its living descendants together (a server's engine)."""
    running = _all()
    below, found = 0.0, {pid}
    while found:
        found = {child for child, process in running.items() if process.parent in found}
        below += sum(running[child].cpu_s for child in found)
    return running[pid].cpu_s if pid in running else 0.0, below


def in_process(function: Callable[..., Any], seconds: float, *arguments: Any) -> Any:
    """What `function` gives in a fresh process; Failed where it raises or takes longer than `seconds`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(seconds):
            raise Failed(f"{function.__module__} did not answer within {seconds:.0f} s")
        answer = ours.recv()
    except EOFError:
        raise Failed(f"{function.__module__} ended without a word") from None
    finally:
        process.terminate()
        process.join()
    if isinstance(answer, Exception):
        raise Failed(str(answer))
    return answer


def _answer(pipe: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        pipe.send(function(*arguments))
    except Exception as error:  # noqa: BLE001 - raised again in the other process
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))
