"""Where the client says what it does to whoever traces it, and by which header a teacher hears of the present span.

It imports no OpenTelemetry; `student_trainer.traces` has the tracer that does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")

TRACEPARENT: ContextVar[str] = ContextVar("traceparent", default="")
"""The present span as W3C Trace Context names it; "" outside of any."""


class Tracer(Protocol):
    """Makes spans."""

    def span(self, name: str, attributes: Mapping[str, Any]) -> AbstractContextManager[None]:
        """A span for what is done inside, named by TRACEPARENT meanwhile."""
        ...


class _NoTracer:
    def span(self, name: str, attributes: Mapping[str, Any]) -> AbstractContextManager[None]:
        return nullcontext()


NO_TRACER: Tracer = _NoTracer()


def headers() -> tuple[tuple[str, str], ...]:
    """The header, or metadata, of a call within the present span."""
    value = TRACEPARENT.get()
    return (("traceparent", value),) if value else ()


def here(function: Callable[..., Result], *arguments: Any) -> Callable[[], Result]:
    """`function` as another thread is to run it: within the span that is the present one here."""
    return partial(copy_context().run, function, *arguments)
