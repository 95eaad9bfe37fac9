"""Which replica gets a call, and what happens when it fails: spread, failover, retries, patience.

It knows no message and no limit. Scoring is a pure function of fingerprint, ids and specification, and a completion
that was not delivered has no effect: repeating a call is safe. `watch.py` looks after replicas that are down.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from protos import errors
from protos.scores import TeacherInfo
from student_trainer.teacher_client.names import Name
from student_trainer.teacher_client.transport import Transport

log = logging.getLogger(__name__)
Result = TypeVar("Result")

FIRST_BACKOFF_S = 0.2
LONGEST_BACKOFF_S = 10.0
REFUSED_S = 30.0
"""Seconds after which a replica that was another teacher is asked again who it is."""


@dataclass(eq=False)
class Replica:
    """One server: its connection, the tokens that it is working on for this client, and until when it is left alone."""

    transport: Transport
    name: Name | None = None
    outstanding: int = 0
    failures: int = 0
    blocked_until: float = 0.0
    down: bool = False
    """Whether it has to say who it is before it gets calls again, as long as there are others."""
    refused: str = ""
    """Why it gets no calls: it is another teacher."""
    calls: int = 0
    failed: int = 0


@dataclass(frozen=True)
class ReplicaStatus:
    """How a client sees one server: attempts so far and those that failed, tokens in progress, whether it gets calls.

    `state` is "up", "waited for" (it failed or named a delay), "down" (until it has said who it is) or why it is
    refused.
    """

    address: str
    calls: int
    failed: int
    outstanding_tokens: int
    state: str


class Replicas:
    """Carries out attempts on one of several servers; thread-safe.

    An attempt goes to the server with the fewest outstanding tokens among those that are not waited for. After
    Unavailable a server is left alone for a growing, jittered time, and where there are others until it has said who it
    is; after Overloaded for the time that it named. Calls go on with the others meanwhile. One that turns out to be
    another teacher is left out, with an error in the log, until it is the right one. A call that has found no server
    for `patience_s` seconds raises its last error. Errors that are not retryable are raised at once.
    """

    def __init__(
        self,
        transports: Sequence[Transport],
        patience_s: float,
        on_wait: Callable[[str], None] | None = None,
        names: Sequence[Name] = (),
    ) -> None:
        if not transports and not names:
            raise ValueError("a client needs at least one address")
        self.replicas = [Replica(t) for t in transports]
        self.names = tuple(names)
        self.lock = threading.Lock()
        self.closed = threading.Event()
        self.fingerprint = ""
        """That of the teacher whose replicas these are; empty until one has answered."""
        self.noticed = threading.Event()
        """Set when a replica went down or was refused, for who looks after them."""
        self._patience_s = patience_s
        self._on_wait = on_wait
        self.look_up()

    def __len__(self) -> int:
        return len(self.replicas)

    @property
    def several(self) -> bool:
        """Whether there are, or may be, others beside one."""
        return len(self.replicas) > 1 or bool(self.names)

    @property
    def addresses(self) -> list[str]:
        """Addresses of all servers."""
        return [r.transport.address for r in self.replicas]

    def status(self) -> list[ReplicaStatus]:
        """Every server as it is seen now."""
        with self.lock:
            now = time.monotonic()
            return [
                ReplicaStatus(r.transport.address, r.calls, r.failed, r.outstanding, r.refused or _state(r, now))
                for r in self.replicas
            ]

    def close(self) -> None:
        """Ends waits and calls in flight; they raise Unavailable."""
        self.closed.set()
        self.noticed.set()
        with self.lock:
            replicas = list(self.replicas)
        for replica in replicas:
            replica.transport.close()

    def look_up(self) -> None:
        """Asks DNS for the names' addresses: new ones are taken in, those that are gone get no more calls."""
        for name in self.names:
            try:
                addresses = name.look_up()
            except OSError as error:
                log.warning("%s: no address found (%s); going on with those known", name.address, error)
                continue
            with self.lock:
                if self.closed.is_set():
                    return
                known = {r.transport.address: r for r in self.replicas if r.name is name}
                for address in addresses:
                    if address not in known:
                        new = Replica(name.open(address), name, down=bool(self.fingerprint))
                        self.replicas.append(new)
                        self.noticed.set()
                left = [replica for address, replica in known.items() if address not in addresses]
                self.replicas = [replica for replica in self.replicas if replica not in left]
            for replica in left:
                log.info("%s: %s is gone", name.address, replica.transport.address)
                self._close_idle(replica)

    def agree(self, infos: dict[str, TeacherInfo]) -> TeacherInfo:
        """The teacher that all of `infos`, by address, are; TeacherMismatch where they are not one."""
        found = {address: info.fingerprint for address, info in infos.items()}
        if len(set(found.values())) > 1:
            listed = "; ".join(f"{address} is {infos[address].name} with {print_}" for address, print_ in found.items())
            raise errors.TeacherMismatch(f"these are not replicas of one teacher, their fingerprints differ: {listed}")
        self.fingerprint = next(iter(found.values()))
        return next(iter(infos.values()))

    def refuse(self, replica: Replica, why: str) -> None:
        """Leaves a replica out that is another teacher."""
        with self.lock:
            news = not replica.refused
            replica.refused, replica.blocked_until = why, time.monotonic() + REFUSED_S
        self.noticed.set()
        if news:
            log.error("%s is left out: %s", replica.transport.address, why)

    def back(self, replica: Replica) -> None:
        """Lets a replica have calls again."""
        with self.lock:
            replica.down, replica.refused, replica.failures, replica.blocked_until = False, "", 0, 0.0

    def call(
        self, cost: int, attempt: Callable[[Transport], Result], progress: Callable[[], int] = lambda: 0
    ) -> Result:
        """The result of `attempt`, repeated as the class says. `cost` is the call's number of tokens.

        `progress` is compared between failures: where it has changed, patience begins anew.
        """
        failing_since: float | None = None
        before = progress()
        while True:
            if self.closed.is_set():
                raise errors.Unavailable("the client was closed")
            replica = self._take(cost)
            if replica is None:
                failure: errors.TeacherError = errors.Unavailable(
                    f"no server is known at {', '.join(name.address for name in self.names)}", retry_after_s=1.0
                )
                failing_since = failing_since or time.monotonic()
                self._wait(None, failure, failing_since)
                self.look_up()
                continue
            try:
                result = attempt(replica.transport)
            except errors.TeacherError as error:
                failure = error
                replica.failed += 1
            else:
                replica.failures = 0
                replica.down = False
                return result
            finally:
                self._give(replica, cost)
            if self.closed.is_set():
                raise errors.Unavailable("the client was closed") from failure
            if isinstance(failure, errors.TeacherMismatch) and self.several and self.fingerprint:
                self.refuse(replica, failure.message)
                continue
            if not failure.retryable:
                raise failure
            if failing_since is None or progress() != before:
                failing_since, before = time.monotonic(), progress()
            self.block(replica, failure)
            self._wait(replica, failure, failing_since)

    def _take(self, cost: int) -> Replica | None:
        """The replica for a call; None where there is none, TeacherMismatch where all are another teacher."""
        with self.lock:
            now = time.monotonic()
            usable = [replica for replica in self.replicas if not replica.refused]
            if not usable and self.replicas:
                raise errors.TeacherMismatch("; ".join(f"{r.transport.address}: {r.refused}" for r in self.replicas))
            if not usable:
                return None
            replica = min(usable, key=lambda r: (r.down, max(0.0, r.blocked_until - now), r.outstanding))
            replica.outstanding += cost
            replica.calls += 1
            return replica

    def _give(self, replica: Replica, cost: int) -> None:
        with self.lock:
            replica.outstanding -= cost
        self._close_idle(replica)

    def _close_idle(self, replica: Replica) -> None:
        """Closes the connection to a server whose name has no longer its address, once no call needs it."""
        with self.lock:
            left = replica not in self.replicas and replica.outstanding == 0
        if left:
            replica.transport.close()

    def block(self, replica: Replica, error: errors.TeacherError) -> None:
        """Leaves a replica alone for a while, and out where it is down and there are others."""
        with self.lock:
            replica.failures += 1
            backoff = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(replica.failures - 1, 16))
            delay = backoff * random.uniform(0.5, 1.0)
            if error.retry_after_s is not None:  # never before the server's own delay, and not all clients at once
                asked = error.retry_after_s * random.uniform(1.0, 1.25)
                delay = asked if isinstance(error, errors.Overloaded) else max(delay, asked)
            replica.blocked_until = time.monotonic() + delay
            if isinstance(error, errors.Unavailable) and self.several:
                replica.down = True
                self.noticed.set()

    def _wait(self, replica: Replica | None, error: errors.TeacherError, since: float) -> None:
        """Sleeps until some replica may be asked again; raises `error` where patience is over before that."""
        now = time.monotonic()
        waited, remaining = now - since, since + self._patience_s - now
        with self.lock:
            usable = [r.blocked_until for r in self.replicas if not r.refused]
        delay = max(0.0, min(usable) - now) if usable else error.retry_after_s or 1.0
        if delay == 0 and len(usable) > 1 and remaining > 0:
            return
        if remaining <= 0:
            raise error.reworded(f"{error.message}; waited {waited:.0f} s", index=error.index) from error
        if self._on_wait is not None:
            where = f"{replica.transport.address}: " if replica is not None else ""
            self._on_wait(f"{where}{error.message}; waiting, {waited:.0f} s of {self._patience_s:.0f} s")
        if self.closed.wait(min(delay, remaining)):
            raise errors.Unavailable("the client was closed") from error


def _state(replica: Replica, now: float) -> str:
    return "down" if replica.down else "waited for" if replica.blocked_until > now else "up"
