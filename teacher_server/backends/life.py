"""One engine from its start to its death, and the calls that end when it does.

A call that fails has the engine looked at, so that a death is known by the time that the first client hears of it. An
engine that has work and finishes no step is dead too, and one that has had none for a while is asked for a score of two
tokens. It knows no restart.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar, cast

from protos.errors import TeacherError, TeacherFailed, Unavailable
from protos.scores import ScoreSpec, Sequence, ids_array
from teacher_server.backends.base import Backend

_LOG = logging.getLogger(__name__)
Item = TypeVar("Item")

RETRY_S = 2.0
"""Seconds after which a client asks again while the engine is down."""
CANARY = (0, 1)
"""Tokens that every vocabulary has, to be scored as a sign of life."""
CANARIES = 3
"""Canaries that an engine may fail on in a row."""


@dataclass(frozen=True)
class Patience:
    """Seconds: between two looks at the engine, for its answer to one, and for its end when it is closed.

    `step_s` for a step while it has work, `canary_s` without a sign of life until it is asked for one, `start_s` for
    its start.
    """

    look_s: float = 0.5
    answer_s: float = 5.0
    close_s: float = 30.0
    step_s: float = 600.0
    canary_s: float = 60.0
    start_s: float = 7200.0


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
        self._steps = engine.steps
        self._step_at = self._proved_at = asyncio.get_running_loop().time()
        self._failures = self._canaries_lost = 0
        self._canary: asyncio.Task[None] | None = None
        self._sang_at = 0.0

    @property
    def proved(self) -> bool:
        """Whether the engine has answered lately; its start, which ends with a check of itself, counts as an answer."""
        return asyncio.get_running_loop().time() - self._proved_at < 2 * self._patience.canary_s

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
        if self._canary is not None:
            self._canary.cancel()
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
                    answer = await call()
                finally:
                    self._waits.discard(limit)
            self._proved_at, self._failures = asyncio.get_running_loop().time(), 0
            return answer
        except Exception as error:
            self._failures += isinstance(error, TeacherFailed)
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
        if self._over.is_set() or (self._moves() and await self._answers()) or self._over.is_set():
            return
        _LOG.warning("the engine died; %d calls in flight end with Unavailable", len(self._waits))
        self._on_death()
        self.end()

    def _moves(self) -> bool:
        """Whether the engine finishes steps while it has work; one that has not answered lately gets a canary."""
        now, patience = asyncio.get_running_loop().time(), self._patience
        if self.engine.steps != self._steps or not self._waits:
            if self._waits and not self._failures:  # long completions give no answer before they end
                self._proved_at = now
            self._steps, self._step_at = self.engine.steps, now
        stale = now - self._proved_at >= patience.canary_s and now - self._sang_at >= patience.canary_s / 4
        if stale and (self._canary is None or self._canary.done()):
            self._sang_at = now
            self._canary = asyncio.create_task(self._sing())
        if self._canaries_lost >= CANARIES:
            _LOG.error("the engine failed on %d canaries; it is started again", self._canaries_lost)
            return False
        if now - self._step_at >= patience.step_s:
            _LOG.error(
                "the engine has %d calls and has finished no step for %.0f s; it is taken for hung",
                len(self._waits),
                now - self._step_at,
            )
            return False
        return True

    async def _sing(self) -> None:
        """Asks for one score of two tokens; an engine that hangs on it has work and finishes no step."""
        try:
            await self.within(lambda: self.engine.score(Sequence(ids_array(CANARY)), ScoreSpec()))
            self._canaries_lost = 0
        except TeacherError as error:
            self._canaries_lost += isinstance(error, TeacherFailed)
            _LOG.warning("the engine failed on a canary: %s", error.__cause__ or error)
        except Exception:  # noqa: BLE001 - logged whole; what an engine raises is no reason to stop watching it
            self._canaries_lost += 1
            _LOG.exception("the engine failed on a canary")

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
