"""How much may be on its way in: bytes of calls that are being received, and the time that a body gets.

It knows no transport; both take their bytes and seconds from one object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from protos.errors import DeadlineExceeded, Overloaded

RETRY_S = 1.0


class Reading:
    """Counts the bytes that are held at the same time; `most` bytes, and a body of N bytes gets body_s + N / rate."""

    def __init__(self, most: int, body_s: float, bytes_per_s: float) -> None:
        self._most, self._body_s, self._rate = most, body_s, bytes_per_s
        self.held = 0

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """A function to call with each number of bytes that has come; Overloaded where there are too many in all."""
        own = 0

        def add(size: int) -> None:
            nonlocal own
            if self.held + size > self._most and self.held > own:
                raise Overloaded(
                    f"{self.held} bytes of calls are being received, this server holds {self._most}; retry later",
                    retry_after_s=RETRY_S,
                )
            own += size
            self.held += size

        try:
            yield add
        finally:
            self.held -= own

    def seconds(self, received: int) -> float:
        """Seconds from a body's begin in which the rest of it must come."""
        return self._body_s + received / self._rate

    def too_slow(self, received: int) -> DeadlineExceeded:
        """What a body gets that did not come in time."""
        return DeadlineExceeded(
            f"{received} bytes of the call came in {self.seconds(received):.3g} s, and not its end; this server waits "
            f"{self._body_s:g} s and one more for each {self._rate / 1024:g} KiB"
        )
