"""Ends the processes of an engine whose start was interrupted; they would outlive this one and keep its GPUs' memory.

It knows processes below this one, no engine.
"""

from __future__ import annotations

import contextlib

import psutil


def end_processes(seconds: float) -> None:
    """Asks every process that this one started, and theirs, to end; kills those that have not in `seconds`."""
    below = [process for process in psutil.Process().children(recursive=True) if not _frees_memory(process)]
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(below, timeout=seconds)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _frees_memory(process: psutil.Process) -> bool:
    """Whether it is Python's own helper, which frees shared memory once the others have ended, and then ends too."""
    try:
        return "multiprocessing.resource_tracker" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False
