"""One request over either transport, from its first byte to its last: its id, its trace, and what its bytes cost.

The transports begin one for each request, before anything else; whatever runs for the request finds it in `CURRENT`.
It knows no transport, no message and no service.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

Item = TypeVar("Item")

REQUEST_ID_HEADER = "x-request-id"
"""Header of every HTTP answer, and key of every gRPC call's trailing metadata."""
TRACE_HEADER = "traceparent"
"""W3C Trace Context: header, or gRPC metadata key, by which a caller names the span that the request belongs to."""


@dataclass(eq=False)
class Exchange:
    """See the module. `client` and `method` are "" until they are known, and stay so for what is no call."""

    request_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    traceparent: str = ""
    began: float = field(default_factory=time.time)
    """Seconds since the epoch."""
    client: str = ""
    method: str = ""
    transport: str = ""
    read_s: float = 0.0
    """Seconds in which what came was made into objects."""
    write_s: float = 0.0
    """Seconds in which answers were made into bytes."""

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Counts what is done inside as reading."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.read_s += time.perf_counter() - began

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Counts what is done inside as writing."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.write_s += time.perf_counter() - began

    def reads(self, work: Callable[[], Item]) -> Callable[[], Item]:
        """`work`, which counts as reading wherever it is called."""

        def counted() -> Item:
            with self.reading():
                return work()

        return counted

    def writes(self, work: Callable[[], Item]) -> Callable[[], Item]:
        """`work`, which counts as writing wherever it is called."""

        def counted() -> Item:
            with self.writing():
                return work()

        return counted

    def written(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items; what it takes to make them counts as writing, what their receiver does in between does not."""
        began = time.perf_counter()
        for item in items:
            self.write_s += time.perf_counter() - began
            yield item
            began = time.perf_counter()
        self.write_s += time.perf_counter() - began


CURRENT: ContextVar[Exchange | None] = ContextVar("exchange", default=None)
"""The request for which the present code runs; None where it runs for none."""


def begin(headers: Mapping[str, str]) -> Exchange:
    """A new exchange as the current one; `headers` has lower-case names."""
    exchange = Exchange(traceparent=headers.get(TRACE_HEADER, ""))
    CURRENT.set(exchange)
    return exchange


def current() -> Exchange:
    """The current exchange; one of its own where no transport began any."""
    return CURRENT.get() or Exchange()
