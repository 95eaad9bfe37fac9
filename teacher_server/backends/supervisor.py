"""An engine that is started again when it dies: itself a `base.Backend`, around whatever makes one.

A dead engine is closed, and another is made after a growing delay; one with another model is refused. After too many
restarts it gives up and says why. How a death is seen is `life.py`'s. It knows no engine, no service and no process.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from collections.abc import Set as AbstractSet
from enum import Enum

from protos.errors import Unavailable
from protos.head import Head
from protos.scores import Ids, Mode, Sampling, Scores, ScoreSpec, Sequence, TeacherInfo
from teacher_server.backends.base import Backend, Piece, Room, TextCodec
from teacher_server.backends.life import RETRY_S, Life, Patience, down
from teacher_server.backends.options import RestartPolicy
from teacher_server.backends.steps import Observer, nobody

_LOG = logging.getLogger(__name__)

LONGEST_BACKOFF_S = 30.0


class StartTooLong(ValueError):
    """An engine did not start in time; what it began may still run."""


class EngineState(Enum):
    """Where the engine is."""

    DOWN = "down"
    STARTING = "being started again"
    UP = "up"
    GIVEN_UP = "down for good"


class Supervised:
    """See the module. `make_backend` runs in a thread; `on_state` is called on the event loop at each change.

    `start` raises what the first engine's start raises; from then on failures are logged and tried again.
    """

    def __init__(
        self,
        make_backend: Callable[[], Backend],
        policy: RestartPolicy,
        on_state: Callable[[EngineState], None],
        patience: Patience | None = None,
    ) -> None:
        self._make, self._policy, self._on_state = make_backend, policy, on_state
        self._patience = patience or Patience()
        self._state = EngineState.DOWN
        self._life: Life | None = None
        self._engine: Backend | None = None
        self._watch: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._begun: deque[float] = deque()
        self._fingerprint = ""
        self._batch_tokens = 0
        self._room = Room(0, 0)
        self._observer: Observer = nobody
        self.gave_up = ""
        """Why it does not go on; empty while it does."""
        self.left_behind = False
        """Whether something of an engine may still run that did not end in time; only the process's end ends it."""

    def observe(self, observer: Observer) -> None:
        """Tells `observer` of the steps of each engine that is started from now on."""
        self._observer = observer

    @property
    def info(self) -> TeacherInfo:
        """What GetTeacher answers; Unavailable while the engine is down."""
        return self._running().engine.info

    @property
    def text(self) -> TextCodec:
        """The tokenizer and template; Unavailable while the engine is down."""
        return self._running().engine.text

    @property
    def batch_tokens(self) -> int:
        """Tokens of one step of the engine that runs, or ran last."""
        return self._batch_tokens

    @property
    def steps(self) -> int:
        """Steps of the engine that runs."""
        return self._running().engine.steps

    @property
    def generation_room(self) -> Room:
        """Room of the engine that runs, or ran last."""
        return self._room

    async def start(self) -> None:
        """Starts the first engine and watches it from then on."""
        try:
            await self._begin()
        except Exception:
            await self._close_engine()
            raise
        self._watch = asyncio.create_task(self._supervise())

    async def score(self, sequence: Sequence, spec: ScoreSpec) -> Scores:
        """The engine's scores; Unavailable where it dies meanwhile."""
        life = self._running()
        return await life.within(lambda: life.engine.score(sequence, spec))

    async def head(self, rows: int) -> AsyncIterator[Head]:
        """The engine's head; Unavailable where it dies meanwhile."""
        life = self._running()
        async for part in life.each(lambda: life.engine.head(rows)):
            yield part

    def generate(
        self,
        prompt_ids: Ids,
        sampling: Sampling,
        *,
        n: int,
        logprobs: bool,
        stream: bool,
        mode: Mode | None,
        alternatives: int = 0,
        dropped: AbstractSet[int] = frozenset(),
    ) -> AsyncIterator[list[Piece]]:
        """The engine's pieces; Unavailable where it dies meanwhile."""
        life = self._running()
        return life.each(
            lambda: life.engine.generate(
                prompt_ids,
                sampling,
                n=n,
                logprobs=logprobs,
                stream=stream,
                mode=mode,
                alternatives=alternatives,
                dropped=dropped,
            )
        )

    async def healthy(self) -> bool:
        """Whether the engine runs, as far as is known, and has finished a step lately."""
        return self._state is EngineState.UP and self._life is not None and self._life.proved

    async def close(self) -> None:
        """Stops watching and ends the engine; calls in flight fail with Unavailable."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait({self._watch})
        life, self._life = self._life, None
        if life is not None:
            life.end()
        await self._close_engine()

    def _running(self) -> Life:
        if self._life is None:
            raise Unavailable(self.gave_up, retry_after_s=RETRY_S) if self.gave_up else down()
        return self._life

    async def _supervise(self) -> None:
        """Until it gives up: waits for the engine's death, then for another's start."""
        try:
            while not self.gave_up:
                if self._life is not None:
                    await self._life.death()
                await self._close_engine()
                await self._restart()
        except Exception:  # noqa: BLE001 - logged whole, and the server ends
            _LOG.exception("the engine's supervisor failed")
            self._give_up("its supervisor failed, see the log")

    def _died(self) -> None:
        self._life = None
        self._become(EngineState.DOWN)

    async def _restart(self) -> None:
        """One attempt, after its delay; `gave_up` is set where there are no more."""
        policy, loop = self._policy, asyncio.get_running_loop()
        while self._begun and self._begun[0] < loop.time() - policy.window_s:
            self._begun.popleft()
        if len(self._begun) >= policy.attempts:
            self._give_up(f"the engine died, and was started again {policy.attempts} times in {policy.window_s:g} s")
            return
        delay = min(LONGEST_BACKOFF_S, policy.backoff_s * 2.0 ** len(self._begun))
        _LOG.warning("restart %d of %d begins in %g s", len(self._begun) + 1, policy.attempts, delay)
        await asyncio.sleep(delay)
        self._begun.append(loop.time())
        self._become(EngineState.STARTING)
        try:
            await self._begin()
        except StartTooLong as error:
            self._give_up(str(error))
        except Exception:  # noqa: BLE001 - logged whole, and tried again
            _LOG.exception("the engine could not be started again")
            self._become(EngineState.DOWN)

    async def _begin(self) -> None:
        """Makes and starts an engine, which must be of the first one's fingerprint."""
        try:
            async with asyncio.timeout(self._patience.start_s) as limit:
                self._engine = engine = await asyncio.to_thread(self._make)
                engine.observe(self._observer)
                await engine.start()
        except TimeoutError as error:
            if not limit.expired():
                raise
            self._engine, self.left_behind = None, True
            raise StartTooLong(f"the start took more than the {self._patience.start_s:g} s of watch.start_s") from error
        except asyncio.CancelledError:
            self._engine, self.left_behind = None, True  # a thread that reads weights cannot be stopped
            raise
        info = engine.info
        self._fingerprint = self._fingerprint or info.fingerprint
        if info.fingerprint != self._fingerprint:
            await self._close_engine()
            self._give_up(
                f"the engine that was started again has fingerprint {info.fingerprint}, the first had "
                f"{self._fingerprint}: the model's files or the software changed under the running teacher"
            )
            return
        self._batch_tokens, self._room = engine.batch_tokens, engine.generation_room
        self._life = Life(engine, self._patience, self._died)
        _LOG.info("the engine runs: %s, %s, %s, fingerprint %s", info.name, info.engine, info.dtype, info.fingerprint)
        self._become(EngineState.UP)

    def _give_up(self, why: str) -> None:
        self.gave_up = f"the teacher gives up: {why}"
        self._become(EngineState.GIVEN_UP)

    def _become(self, state: EngineState) -> None:
        if state is not self._state:
            self._state = state
            self._on_state(state)

    async def _close_engine(self) -> None:
        """Ends the engine that there is, and leaves it alone where it does not end in time."""
        engine, self._engine = self._engine, None
        if engine is not None:
            task = asyncio.create_task(engine.close())
            task.add_done_callback(self._closed)
            self._closing.add(task)
        if not self._closing:
            return
        _, late = await asyncio.wait(self._closing, timeout=self._patience.close_s)
        for task in late:
            self.left_behind = True
            _LOG.error("an engine did not end in %g s; it is left alone", self._patience.close_s)
            task.cancel()
        self._closing -= late

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._closing.discard(task)
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _LOG.error("an engine failed while it ended", exc_info=error)
