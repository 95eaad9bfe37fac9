"""SIGINT and SIGTERM while a stage trains: the first asks for a checkpoint and the end, a second ends the process.

The run stops between two optimizer steps. Where the step that is going on takes longer than GRACE_S (it samples, or
waits for the teacher), it is broken off instead: an exception is raised in the main thread, but never inside the
optimizer step or while something is saved. Knows no Trainer; saving is the business of whoever catches `Interrupted`.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from . import distributed
from .errors import Interrupted

GRACE_S = 10.0
"""How long the step that is going on may take to end by itself."""
ECHO_S = 2.0
"""torchrun passes a signal on, and who ended the whole group has sent it too: for so long a second one is the same."""
SAVE_S = 120
"""How long several processes wait for one another to save before each ends itself."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopper:
    """Signals of one stage. Every process of a run has one."""

    def __init__(self) -> None:
        self.number: int | None = None
        self._held, self._due = 0, False

    @contextmanager
    def catching(self) -> Iterator[None]:
        """Signals are this object's until the block ends; in another thread than the main one nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._first) for number in SIGNALS}
        alarm = signal.signal(signal.SIGALRM, self._late)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
            if self.number is None:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def check(self) -> None:
        """Raises `Interrupted` where any process was asked to stop. All processes call it at the same place."""
        numbers = [n for n in distributed.gather(self.number) if n is not None]
        if numbers:
            self.number = numbers[0]
            raise Interrupted(self.number)

    def hold(self) -> None:
        """From here to `release` nothing is broken off."""
        self._held += 1

    def release(self) -> None:
        """The counterpart of `hold`; raises `Interrupted` where the time was up meanwhile."""
        self._held -= 1
        if self._due and not self._held:
            self._late(signal.SIGALRM, None)

    @contextmanager
    def held(self) -> Iterator[None]:
        """`hold` and `release` around a block."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def saving(self) -> None:
        """Whoever caught `Interrupted` saves now: nothing is broken off any more, but several processes do not wait for
        one that is gone.
        """
        self._due = False
        self._held += 1
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)
            if distributed.world() > 1:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(SAVE_S)

    def _first(self, number: int, frame: object) -> None:
        self.number = number
        alone = distributed.world() == 1
        for other in SIGNALS:  # the system's own action needs no Python, so it ends even a long computation
            signal.signal(other, signal.SIG_DFL if alone else signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, GRACE_S if alone else ECHO_S, GRACE_S)
        if distributed.is_main():
            text = f"{signal.Signals(number).name}: saving a checkpoint and stopping; a second signal stops at once\n"
            os.write(2, text.encode())

    def _late(self, number: int, frame: object) -> None:
        assert self.number is not None
        if signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:  # the echo is over, the grace begins
            for other in SIGNALS:
                signal.signal(other, signal.SIG_DFL)
            return
        self._due = True
        if not self._held:
            raise Interrupted(self.number)
