"""Runs a Python module as a child that ends when its parent does.

    python -m student_trainer.watched PARENT MODULE ARG...

A parent that is killed cannot stop its children. So the child looks twice a second whether its parent still is the
process PARENT, which holds on every Unix and however the parent ended, and stops itself in order, then by force.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

PERIOD_S = 0.5
GRACE_S = 10.0


def watch(parent: int) -> None:
    """Waits until this process has another parent than `parent`, then ends the process and those it started."""
    while os.getppid() == parent:
        time.sleep(PERIOD_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Runs the module as `python -m MODULE ARG...` would."""
    parent, module = int(sys.argv[1]), sys.argv[2]
    sys.argv = sys.argv[2:]
    threading.Thread(target=watch, args=(parent,), name="parent-watch", daemon=True).start()
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
