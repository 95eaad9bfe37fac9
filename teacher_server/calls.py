"""Calls in progress: each one's deadline, outcome and end, for metrics, for draining and for the log.

It knows no request and no engine.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from protos.errors import DeadlineExceeded, Overloaded, TeacherError, TeacherFailed, Unavailable
from teacher_server.auth import Caller
from teacher_server.live import Live
from teacher_server.metrics import Metrics
from teacher_server.traces import NO_TRACES, CallTrace, Traces
from teacher_server.usage import UsageByClient

log = logging.getLogger(__name__)
Item = TypeVar("Item")

RETRY_S = 5.0
"""Seconds after which a client asks again while the teacher loads or shuts down."""


class Call:
    """One call in progress."""

    def __init__(self, caller: Caller) -> None:
        self.caller = caller
        self.started = asyncio.get_running_loop().time()
        self.deadline = None if caller.timeout_s is None else self.started + caller.timeout_s
        """Event loop time at which it must have ended; None is never."""
        self.trace = CallTrace()
        """What is told of it to whoever traces calls."""
        self._given_up = False
        self._timeout: asyncio.Timeout | None = None

    @property
    def late(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and asyncio.get_running_loop().time() >= self.deadline

    async def within(self, item: Awaitable[Item], missing: str) -> Item:
        """What `item` gives; DeadlineExceeded, with `missing` in its text, once the call's time is over.

        Unavailable once the call was given up.
        """
        try:
            async with asyncio.timeout_at(self.deadline) as self._timeout:
                return await item
        except TimeoutError as error:
            if self._given_up:
                raise Unavailable(
                    f"the teacher shut down with {missing}; retry later", retry_after_s=RETRY_S
                ) from error
            raise DeadlineExceeded(
                f"the deadline of {self.caller.timeout_s:.3g} s passed with {missing}; "
                "ask for less at once or allow more time"
            ) from error
        finally:
            self._timeout = None

    def give_up(self) -> None:
        """Ends the call with Unavailable at its next wait, the present one included."""
        self._given_up = True
        self.deadline = asyncio.get_running_loop().time()
        if self._timeout is not None:
            self._timeout.reschedule(self.deadline)


class Calls:
    """All calls in progress."""

    def __init__(self, metrics: Metrics, usage: UsageByClient, live: Live, traces: Traces = NO_TRACES) -> None:
        self._metrics = metrics
        self._usage = usage
        self._live = live
        self._traces = traces
        self._open: set[Call] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open(self) -> int:
        """Number of calls in progress."""
        return len(self._open)

    async def idle(self) -> None:
        """Returns once no call is in progress."""
        await self._idle.wait()

    def give_up(self) -> None:
        """Ends every call in progress with Unavailable."""
        for call in tuple(self._open):
            call.give_up()

    @contextmanager
    def decoding(self, method: str, caller: Caller) -> Iterator[None]:
        """Counts a call whose bytes make no sense, which therefore never begins."""
        label = self._introduce(method, caller)
        try:
            yield
        except TeacherError as error:
            self._metrics.requests.labels(label, method, caller.transport, error.reason).inc()
            self._live.failed(method, caller, error)
            _log(method, caller, error.reason, time.time() - caller.exchange.began, error)
            raise

    @contextmanager
    def enter(self, method: str, caller: Caller) -> Iterator[Call]:
        """A call's life; what is no error of the tree is logged with the call's id and becomes TeacherFailed."""
        call = Call(caller)
        label = self._introduce(method, caller)
        outcome = "OK"
        failure: TeacherError | None = None
        self._open.add(call)
        self._idle.clear()
        self._metrics.in_flight.labels(method).inc()
        self._live.began(caller)
        usage = self._usage.of(caller.name)
        usage.score_calls += method == "score"
        usage.generate_calls += method == "generate"
        try:
            yield call
        except TeacherError as error:
            outcome, failure = error.reason, error
            self._usage.of(caller.name).overloaded += isinstance(error, Overloaded)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "DEADLINE_EXCEEDED" if call.late else "CANCELLED"
            raise
        except Exception as error:
            failure = TeacherFailed()
            outcome = failure.reason
            log.exception("%s of %s failed (request %s)", method, caller.shown, caller.request_id)
            raise failure from error
        finally:
            self._open.discard(call)
            if not self._open:
                self._idle.set()
            seconds = asyncio.get_running_loop().time() - call.started
            self._metrics.in_flight.labels(method).dec()
            self._metrics.requests.labels(label, method, caller.transport, outcome).inc()
            self._metrics.request_seconds.labels(label, method).observe(seconds)
            self._live.ended(method, caller, seconds, outcome == "OK")
            if failure is not None:
                self._live.failed(method, caller, failure)
            self._traces.ended(method, caller, outcome, call.trace)
            _log(method, caller, outcome, seconds, failure)

    def _introduce(self, method: str, caller: Caller) -> str:
        """The client's label; the call's bytes count as its own from now on."""
        label = self._metrics.clients.enter(caller.name, caller.known)
        exchange = caller.exchange
        exchange.client, exchange.method, exchange.transport = label, method, caller.transport
        return label


def _log(method: str, caller: Caller, outcome: str, seconds: float, failure: TeacherError | None) -> None:
    """One line for each call that has ended."""
    fields = {
        "client": caller.name,
        "label": caller.label,
        "method": method,
        "transport": caller.transport,
        "outcome": outcome,
        "seconds": round(seconds, 6),
    }
    text = outcome if failure is None else f"{outcome}: {failure.message}"
    log.info(
        "%s of %s: %s in %.3f s (request %s)",
        method,
        caller.shown,
        text,
        seconds,
        caller.request_id,
        extra={"fields": fields, "request_id": caller.request_id},
    )
