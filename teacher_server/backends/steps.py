"""What an engine says of its own work: one `Step` for each batch of scores or step of generation.

An engine tells its steps to an `Observer`, in whatever thread, and notes for each score in which step it was computed.
It knows no metric, no trace and no engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["score", "generate"]
KINDS: tuple[Kind, ...] = ("score", "generate")


@dataclass(eq=False)
class Step:
    """One step: how many sequences or completions, and how many of their tokens, it ran."""

    kind: Kind
    sequences: int
    tokens: int
    began: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    seconds: float | None = None
    """How long it took; None while it runs. Answers of a batch may come before its end."""
    readout_s: float = 0.0
    """The part of `seconds` after the forward pass, in which scores are read out of the hidden states."""
    alone: bool = True
    """Whether the engine did nothing else in it; else `seconds` is its share of a longer one."""

    def end(self) -> Step:
        """Says that it has ended now."""
        self.seconds = max(0.0, time.time() - self.began)
        return self


Observer = Callable[[Step], None]
_STEP: ContextVar[list[Step] | None] = ContextVar("step", default=None)


def nobody(_step: Step) -> None:
    """Observes nothing."""


def noting() -> list[Step]:
    """A list to which an engine appends the steps that score what this task, and no other, asks of it."""
    steps: list[Step] = []
    _STEP.set(steps)
    return steps


def note(step: Step | None) -> None:
    """For engines, in the task that asked: the step in which its score was computed, where it is known."""
    steps = _STEP.get()
    if steps is not None and step is not None:
        steps.append(step)
