"""Which replica gets a call, and what happens when it fails: spread, failover, retries, patience.

It knows no message and no limit. Scoring is a pure function of fingerprint, ids and specification, and a completion
that was not delivered has no effect: repeating a call is safe.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from protos import errors
from student_trainer.teacher_client.transport import Transport

Result = TypeVar("Result")

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 10.0


@dataclass
class Replica:
    """One server: its connection, the tokens that it is working on for this client, and until when it is left alone."""

    transport: Transport
    outstanding: int = 0
    failures: int = 0
    blocked_until: float = field(default=0.0)


class Replicas:
    """Carries out attempts on one of several servers; thread-safe.

    An attempt goes to the server with the fewest outstanding tokens among those that are not waited for. After
    Unavailable a server is left alone for a growing, jittered time, after Overloaded for the time that it named; calls
    go on with the others meanwhile. A call that has found no server for `patience_s` seconds raises its last error.
    Errors that are not retryable are raised at once.
    """

    def __init__(
        self, transports: Sequence[Transport], patience_s: float, on_wait: Callable[[str], None] | None = None
    ) -> None:
        if not transports:
            raise ValueError("a client needs at least one address")
        self._replicas = [Replica(t) for t in transports]
        self._patience_s = patience_s
        self._on_wait = on_wait
        self._lock = threading.Lock()
        self._closed = threading.Event()

    def __len__(self) -> int:
        return len(self._replicas)

    @property
    def addresses(self) -> list[str]:
        """Addresses of all servers."""
        return [r.transport.address for r in self._replicas]

    def close(self) -> None:
        """Ends waits and calls in flight; they raise Unavailable."""
        self._closed.set()
        for replica in self._replicas:
            replica.transport.close()

    def call(
        self, cost: int, attempt: Callable[[Transport], Result], progress: Callable[[], int] = lambda: 0
    ) -> Result:
        """The result of `attempt`, repeated as the class says. `cost` is the call's number of tokens.

        `progress` is compared between failures: where it has changed, patience begins anew.
        """
        failing_since: float | None = None
        before = progress()
        while True:
            if self._closed.is_set():
                raise errors.Unavailable("the client was closed")
            replica = self._take(cost)
            try:
                result = attempt(replica.transport)
            except errors.TeacherError as error:
                failure = error
            else:
                replica.failures = 0
                return result
            finally:
                with self._lock:
                    replica.outstanding -= cost
            if self._closed.is_set():
                raise errors.Unavailable("the client was closed") from failure
            if not failure.retryable:
                raise failure
            if failing_since is None or progress() != before:
                failing_since, before = time.monotonic(), progress()
            self._block(replica, failure)
            self._wait(replica, failure, failing_since)

    def _take(self, cost: int) -> Replica:
        with self._lock:
            now = time.monotonic()
            replica = min(self._replicas, key=lambda r: (max(0.0, r.blocked_until - now), r.outstanding))
            replica.outstanding += cost
            return replica

    def _block(self, replica: Replica, error: errors.TeacherError) -> None:
        with self._lock:
            replica.failures += 1
            backoff = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(replica.failures - 1, 16))
            delay = backoff * random.uniform(0.5, 1.0)
            if error.retry_after_s is not None:  # never before the server's own delay, and not all clients at once
                asked = error.retry_after_s * random.uniform(1.0, 1.25)
                delay = asked if isinstance(error, errors.Overloaded) else max(delay, asked)
            replica.blocked_until = time.monotonic() + delay

    def _wait(self, replica: Replica, error: errors.TeacherError, since: float) -> None:
        """Sleeps until some replica may be asked again; raises `error` where patience is over before that."""
        now = time.monotonic()
        waited, remaining = now - since, since + self._patience_s - now
        with self._lock:
            delay = max(0.0, min(r.blocked_until for r in self._replicas) - now)
        if delay == 0 and len(self._replicas) > 1 and remaining > 0:
            return
        if remaining <= 0:
            raise type(error)(
                f"{error.message}; waited {waited:.0f} s", retry_after_s=error.retry_after_s, index=error.index
            ) from error
        if self._on_wait is not None:
            self._on_wait(
                f"{replica.transport.address}: {error.message}; waiting, {waited:.0f} s of {self._patience_s:.0f} s"
            )
        if self._closed.wait(min(delay, remaining)):
            raise errors.Unavailable("the client was closed") from error
