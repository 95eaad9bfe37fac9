"""One engine from its start to its death, and the calls that end when it does.

A call that fails has the engine looked at, so that a death is known by the time that the first client hears of it. It
knows no restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from protos.errors import TeacherError, TeacherFailed, Unavailable
from teacher_server.backends.base import Backend

_LOG = logging.getLogger(__name__)
Item = TypeVar("Item")

RETRY_S = 2.0
"""Seconds after which a client asks again while the engine is down."""


@dataclass(frozen=True)
class Patience:
    """Seconds: between two looks at the engine, for its answer to one, and for its end when it is closed."""

    look_s: float = 0.5
    answer_s: float = 5.0
    close_s: float = 30.0


def down() -> Unavailable:
    """What calls get from an engine that has died."""
    return Unavailable("the teacher's engine died and is started again; retry later", retry_after_s=RETRY_S)


class Life:
    """A running engine; `on_death` is called once, before any call ends because of it."""

    def __init__(self, engine: Backend, patience: Patience, on_death: Callable[[], None]) -> None:
        self.engine = engine
        self._patience, self._on_death = patience, on_death
        self._over = asyncio.Event()
        self._waits: set[asyncio.Timeout] = set()

    async def death(self) -> None:
        """Looks at the engine until it is dead."""
        while not self._over.is_set():
            try:
                async with asyncio.timeout(self._patience.look_s):
                    await self._over.wait()
            except TimeoutError:
                await self._look()

    def end(self) -> None:
        """Ends every call with Unavailable."""
        self._over.set()
        now = asyncio.get_running_loop().time()
        for limit in tuple(self._waits):
            limit.reschedule(now)

    async def within(self, call: Callable[[], Awaitable[Item]]) -> Item:
        """What `call` gives; Unavailable where the engine dies first, or has died by the time that it fails."""
        if self._over.is_set():
            raise down()
        try:
            async with asyncio.timeout(None) as limit:
                self._waits.add(limit)
                try:
                    return await call()
                finally:
                    self._waits.discard(limit)
        except Exception as error:
            if isinstance(error, TeacherError) and not isinstance(error, (TeacherFailed, Unavailable)):
                raise
            await self._look()
            if self._over.is_set():
                raise down() from error
            raise

    async def each(self, call: Callable[[], AsyncIterator[Item]]) -> AsyncIterator[Item]:
        """What `call`'s iterator gives, with the ends that `within` has; leaving it stops the engine's work."""
        items = cast(AsyncGenerator[Item, None], call())  # what engines give are generators
        try:
            while (item := await self.within(lambda: anext(items, None))) is not None:
                yield item
        finally:
            try:
                async with asyncio.timeout(self._patience.answer_s):
                    await items.aclose()
            except TimeoutError:
                _LOG.warning("the engine did not let go of a call in %g s", self._patience.answer_s)

    async def _look(self) -> None:
        """Ends this life where the engine is dead."""
        if self._over.is_set() or await self._answers() or self._over.is_set():
            return
        _LOG.warning("the engine died; %d calls in flight end with Unavailable", len(self._waits))
        self._on_death()
        self.end()

    async def _answers(self) -> bool:
        """Whether the engine says in time that it is healthy."""
        try:
            async with asyncio.timeout(self._patience.answer_s):
                return await self.engine.healthy()
        except TimeoutError:
            _LOG.warning("the engine has not answered for %g s; it is taken for dead", self._patience.answer_s)
        except Exception:  # noqa: BLE001 - logged whole; an engine that cannot be asked is dead
            _LOG.exception("the engine cannot be asked how it is")
        return False
