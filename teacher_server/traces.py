"""Where calls are told to whoever traces them: the seam between the service and `otel_traces.py`.

It imports no OpenTelemetry; without a configured trace a call costs one look at an empty method.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from teacher_server.auth import Caller
from teacher_server.backends.steps import Step


@dataclass(eq=False)
class Part:
    """What of a call went through the engine in one step, or as one prompt: seconds since the epoch, and numbers.

    `turn_at` is when it was its turn, `ended_at` when its answer was there. `step` is the engine's step, where the
    engine says so, `request_id` the call for which it was computed, which another equal one may have joined.
    """

    admitted_at: float
    turn_at: float
    ended_at: float
    request_id: str
    tokens: int
    step: Step | None = None


@dataclass(eq=False)
class CallTrace:
    """What is known of one call: how much it asks for, what of it was in the cache, and its parts."""

    sequences: int = 0
    tokens: int = 0
    known: int = 0
    """Sequences whose scores were in the cache."""
    parts: list[Part] = field(default_factory=list)


class Traces(Protocol):
    """Is told of each call as it ends."""

    def ended(self, method: str, caller: Caller, outcome: str, trace: CallTrace) -> None:
        """A call has ended; `outcome` is OK, CANCELLED or the error's reason."""
        ...

    def close(self) -> None:
        """Sends what has not been sent yet."""
        ...


class _NoTraces:
    def ended(self, method: str, caller: Caller, outcome: str, trace: CallTrace) -> None: ...

    def close(self) -> None: ...


NO_TRACES: Traces = _NoTraces()
