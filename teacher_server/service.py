"""The teacher: checks a whole call, admits it, and streams its answers back until the call's deadline.

It knows no transport and no engine. Legend: P tokens of a prompt.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from protos.errors import Unavailable
from protos.head import Head, rows_per_message
from protos.scores import CompletionDelta, GenerateRequest, Ids, Mode, Prompt, ScoreRequest, Scores, TeacherInfo
from teacher_server import checks
from teacher_server.auth import Caller
from teacher_server.backends.base import Backend, Room, TextCodec
from teacher_server.backends.steps import Step
from teacher_server.cache import DiskTier, ScoreCache
from teacher_server.calls import RETRY_S, Call, Calls
from teacher_server.generation import Merged, complete, tokenize
from teacher_server.hidden import HiddenBudget
from teacher_server.lengths import Lengths
from teacher_server.live import Live
from teacher_server.metrics import Metrics
from teacher_server.pace import Pace
from teacher_server.scheduling import Cost, Lane, Scheduler, Unit
from teacher_server.scoring import Scoring
from teacher_server.status import Status
from teacher_server.traces import NO_TRACES, Part, Traces
from teacher_server.usage import UsageByClient

SLACK = 1.25
"""Times what the engine generates at once that is submitted, so that whatever ends is followed at once."""
TOKENIZE_IN_THREAD = 1 << 14
"""Number of characters from which a prompt is tokenized off the event loop."""
CHECK_IN_THREAD = 1 << 18
"""Number of ids from which a call is checked off the event loop."""


class State(Enum):
    """Where the service is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "shutting down"


@dataclass(frozen=True)
class ServiceSettings:
    """How much the service takes on and keeps; see the fields of such names in ServerConfig."""

    queue_tokens: int = 4_000_000
    queue_sequences: int = 16_384
    cache: bool = True
    cache_bytes: int = 1024 << 20
    disk_folder: Path | None = None
    disk_bytes: int = 64 << 30
    hidden_bytes: int = 4096 << 20


Landed = asyncio.Queue[tuple[int, asyncio.Task[Scores]]]


def _land(landed: Landed, index: int, task: asyncio.Task[Scores]) -> None:
    landed.put_nowait((index, task))


class TeacherService:
    """One teacher behind any number of transports; all methods run on one event loop."""

    def __init__(
        self,
        settings: ServiceSettings,
        metrics: Metrics,
        clock: Callable[[], float] = time.monotonic,
        traces: Traces = NO_TRACES,
    ) -> None:
        self.metrics = metrics
        self.state = State.LOADING
        self._backend: Backend | None = None
        self._last_info: TeacherInfo | None = None
        self._since = time.monotonic()
        usage = UsageByClient()
        self.live = Live(usage)
        """What happened lately."""
        self.settings = settings
        self._calls = Calls(metrics, usage, self.live, traces)
        self._scheduler = Scheduler(settings.queue_tokens, settings.queue_sequences, clock)
        self._score_lane, self._generate_lane = Lane(0), Lane(0, yields=True)
        cache = ScoreCache(settings.cache_bytes if settings.cache else 0)
        self._disk: DiskTier | None = None
        if settings.cache and settings.disk_folder is not None and settings.disk_bytes:
            self._disk = DiskTier(settings.disk_folder, settings.disk_bytes)
        self._room, self._lengths, self._pace = Room(1, 1), Lengths(), Pace()
        self._scoring = Scoring(
            self._scheduler, self._score_lane, metrics, usage, self.live, cache, self._disk, settings.cache
        )
        self._hidden = HiddenBudget(settings.hidden_bytes, clock)
        self.usage = usage
        """What each client has had."""
        metrics.queue_tokens.set_function(lambda: self._scheduler.tokens)
        metrics.queue_sequences.set_function(lambda: self._scheduler.units)
        if self._disk is not None:
            metrics.disk_bytes.set_function(lambda: self._disk.nbytes if self._disk else 0)
        metrics.hidden_bytes.set_function(lambda: self._hidden.held)
        metrics.submitted_tokens.labels("score").set_function(lambda: self._score_lane.submitted)
        metrics.submitted_tokens.labels("generate").set_function(lambda: self._generate_lane.submitted)

    async def attach(self, backend: Backend) -> None:
        """Opens for calls with a backend that has started; OSError where the disk for scores cannot be used."""
        if self._disk is not None:
            await self._disk.open(backend.info.fingerprint)
        self._backend = backend
        self._last_info = info = backend.info
        self.metrics.info.labels(info.name, info.fingerprint, info.engine, info.dtype, info.quantization).set(1)
        self.measure()
        self.state = State.READY

    def measure(self) -> None:
        """Takes over how much the engine takes; to be called again when it was started anew."""
        if self._backend is not None:
            self._room = self._backend.generation_room
            self._score_lane.capacity = 2 * self._backend.batch_tokens
            self._generate_lane.capacity = int(SLACK * self._room.tokens)

    def observe_step(self, step: Step) -> None:
        """An `Observer` of the engine's steps."""
        self.metrics.observe_step(step)
        self.live.step(step)
        if step.kind == "generate" and step.alone and step.seconds is not None:
            self._pace.observe(step.tokens, step.seconds)
            self._generate_lane.full = self._pace.full

    async def close(self) -> None:
        """Writes scores to the disk that still wait for it; to be called when no call is in progress any more."""
        if self._disk is not None:
            await self._disk.close()

    @property
    def disk(self) -> DiskTier | None:
        """The scores on the disk, where they are kept there."""
        return self._disk

    def drain(self) -> None:
        """Refuses new calls with Unavailable from now on; those in progress go on, and `drained` waits for them."""
        self.state = State.DRAINING

    def decoding(self, method: str, caller: Caller) -> AbstractContextManager[None]:
        """For a transport to make its domain request in, so that one that makes no sense is counted too."""
        return self._calls.decoding(method, caller)

    def give_up(self) -> None:
        """Ends the calls in progress with Unavailable."""
        self._calls.give_up()

    async def drained(self) -> None:
        """Returns once no call is in progress."""
        await self._calls.idle()

    @property
    def open_calls(self) -> int:
        """Number of calls in progress."""
        return self._calls.open

    async def why_not_ready(self) -> str:
        """Empty where the teacher answers calls, else why it does not."""
        if self.state is not State.READY or self._backend is None:
            return f"the teacher is {self.state.value}"
        return "" if await self._backend.healthy() else "the engine does not answer"

    def _open_backend(self) -> Backend:
        if self.state is not State.READY or self._backend is None:
            raise Unavailable(f"the teacher is {self.state.value}; retry later", retry_after_s=RETRY_S)
        return self._backend

    def teacher(self) -> TeacherInfo:
        """What the teacher is; Unavailable while it loads or drains."""
        return self._open_backend().info

    @property
    def text(self) -> TextCodec:
        """The teacher's tokenizer and template; Unavailable while it loads or drains."""
        return self._open_backend().text

    def tokenize(self, index: int, prompt: Prompt, *, special: bool = False, opening: bool = True) -> Ids:
        """int32[P] of a prompt in its mode; InvalidSequence where the template refuses, Unsupported for the mode."""
        backend = self._open_backend()
        checks.check_text(index, prompt, backend.info)
        mode = checks.resolve_mode(prompt, backend.info, index)
        return tokenize(index, prompt, mode, backend.text, special=special, opening=opening)

    def serving(self, method: str, caller: Caller) -> AbstractContextManager[Call]:
        """For a transport to do in what needs no engine, so that it is counted as a call."""
        return self._calls.enter(method, caller)

    async def score(self, request: ScoreRequest, caller: Caller) -> AsyncGenerator[tuple[int, Scores], None]:
        """(index, scores) of every sequence, in the order in which they are ready.

        The whole call is checked before any work. Raises what protos.errors lists; closing the iterator cancels what
        nobody else waits for.
        """
        with self._calls.enter("score", caller) as call:
            backend = self._open_backend()
            call.trace.sequences, call.trace.tokens = len(request.sequences), request.tokens
            if request.tokens + sum(s.positions * s.candidates for s in request.sequences) < CHECK_IN_THREAD:
                checks.check_score(request, backend.info)
            else:
                check = asyncio.to_thread(checks.check_score, request, backend.info)
                await call.within(check, "the call unchecked")
                self._open_backend()
            with self._hidden.hold(request, backend.info, caller) as hold:
                total, landed = len(request.sequences), Landed()
                begun = await call.within(self._scoring.begin(backend, request, caller), "nothing begun")
                flights = begun.flights
                call.trace.known = len(begun.known)
                try:
                    for index, flight in flights.items():
                        flight.task.add_done_callback(functools.partial(_land, landed, index))
                    for index, scores in begun.known:
                        yield index, scores
                    for batch in self._scoring.batches(request, begun.stored):
                        reading = self._scoring.read(backend, request, batch)
                        found = await call.within(reading, f"{total} sequences not all read")
                        self._scoring.count_read(request, list(found), caller)
                        call.trace.known += len(found)
                        for index in batch:
                            if index in found:
                                yield index, found.pop(index)
                            else:
                                flights[index] = self._scoring.compute_after_all(backend, request, index, caller)
                                flights[index].task.add_done_callback(functools.partial(_land, landed, index))
                    while flights:
                        missing = f"{len(flights)} of {total} sequences unanswered"
                        index, task = await call.within(landed.get(), missing)
                        # What has been handed over is let go of: hidden states are large.
                        flight = flights.pop(index)
                        self._scoring.leave(flight)
                        if flight.unit.part is not None:
                            call.trace.parts.append(flight.unit.part)
                        yield index, task.result()
                        hold.release(index)
                finally:
                    for flight in flights.values():
                        self._scoring.leave(flight)

    async def head(self, fingerprint: str, caller: Caller) -> AsyncGenerator[Head, None]:
        """The LM head in parts that fit one message each; Unsupported where hidden states are not offered."""
        with self._calls.enter("head", caller) as call:
            backend = self._open_backend()
            checks.check_head(fingerprint, backend.info)
            parts = backend.head(rows_per_message(backend.info.hidden_size))
            while (part := await call.within(anext(parts, None), "the head incomplete")) is not None:
                yield part

    async def generate(self, request: GenerateRequest, caller: Caller) -> AsyncGenerator[list[CompletionDelta], None]:
        """New pieces of the completions, at most one for each completion in a list; see `score` for checks and end."""
        with self._calls.enter("generate", caller) as call:
            backend = self._open_backend()
            info, max_tokens = backend.info, request.sampling.max_tokens
            checks.check_generate(request, info)
            modes = [checks.resolve_mode(prompt, info, index) for index, prompt in enumerate(request.prompts)]
            prompts = []
            for index, (prompt, mode) in enumerate(zip(request.prompts, modes, strict=True)):
                if checks.check_text(index, prompt, info) < TOKENIZE_IN_THREAD:
                    prompts.append(tokenize(index, prompt, mode, backend.text))
                else:
                    work = asyncio.to_thread(tokenize, index, prompt, mode, backend.text)
                    prompts.append(await call.within(work, f"prompt {index} not read"))
                checks.check_prompt(index, prompts[-1], max_tokens, info)
                await asyncio.sleep(0)
            checks.check_request_tokens(sum(len(ids) for ids in prompts), info)
            call.trace.sequences, call.trace.tokens = len(prompts), sum(map(len, prompts))
            costs = [self._cost(len(ids), request, mode) for ids, mode in zip(prompts, modes, strict=True)]
            self._open_backend()
            units = self._scheduler.admit(self._generate_lane, caller.name, costs, caller.weight)
            merged = Merged()
            try:
                for index, (unit, ids, mode) in enumerate(zip(units, prompts, modes, strict=True)):
                    task = merged.start(self._complete(backend, request, merged, unit, index, ids, mode, caller))
                    self._scheduler.follow(unit, task)
                unfinished = len(prompts) * request.n
                while unfinished:
                    deltas = await call.within(merged.next(), f"{unfinished} completions unfinished")
                    if deltas is None:
                        break
                    unfinished -= sum(delta.finish_reason is not None for delta in deltas)
                    yield deltas
            finally:
                await merged.close()
                call.trace.parts += [unit.part for unit in units if unit.part is not None]

    def _cost(self, prompt_tokens: int, request: GenerateRequest, mode: Mode | None) -> Cost:
        """What a prompt and its completions are expected to take; each has a row's part of the room at least."""

        def tokens() -> int:
            return prompt_tokens + request.n * self._lengths.expected(mode, request.sampling.max_tokens)

        def load() -> int:
            return max(tokens(), request.n * (self._room.tokens // max(1, self._room.completions)))

        return Cost(tokens(), load, tokens, request.n)

    def load_by_client(self) -> dict[str, int]:
        """Tokens of work admitted and not finished, of each client that has some."""
        return self._scheduler.tokens_by_client

    async def status(self) -> Status:
        """What people are shown."""
        reason = await self.why_not_ready()
        settings, live, metrics = self.settings, self.live, self.metrics
        info = self._backend.info if self._backend is not None and not reason else self._last_info
        return Status(
            now=time.time(),
            up_s=time.monotonic() - self._since,
            state=reason or "ready",
            ready=not reason,
            name=info.name if info else "",
            engine=info.engine if info else "",
            dtype=info.dtype if info else "",
            quantization=info.quantization if info else "",
            fingerprint=info.fingerprint if info else "",
            restarts=int(metrics.engine_restarts._value.get()),
            last_step_s=live.last_step_s(),
            steps=live.steps(),
            rates=live.rates,
            history=live.history,
            queue_tokens=self._scheduler.tokens,
            queue_tokens_limit=settings.queue_tokens,
            queue_sequences=self._scheduler.units,
            queue_sequences_limit=settings.queue_sequences,
            submitted_tokens={"score": self._score_lane.submitted, "generate": self._generate_lane.submitted},
            sequences=dict(live.sequences),
            cache_bytes=self._scoring.cache_bytes,
            cache_limit=settings.cache_bytes if settings.cache else 0,
            disk_bytes=self._disk.nbytes if self._disk else 0,
            disk_limit=settings.disk_bytes if self._disk else 0,
            latency=live.latency(),
            clients=live.clients(self.load_by_client()),
            errors=live.errors,
        )

    async def _complete(
        self,
        backend: Backend,
        request: GenerateRequest,
        merged: Merged,
        unit: Unit,
        index: int,
        prompt_ids: Ids,
        mode: Mode | None,
        caller: Caller,
    ) -> None:
        """Produces one prompt's deltas once it is its turn, and charges the client for what they really are."""
        await unit.turn
        name, label = mode.value if mode else "none", self.metrics.clients.of(caller.name)
        waited, turn_at = self._scheduler.waited(unit), time.time()
        self.metrics.queue_seconds.labels(label, "generate").observe(waited)
        self.metrics.prompt_tokens.labels(label, name).inc(len(prompt_ids))
        generated = self.metrics.generated_tokens.labels(label, name)
        usage = self.usage.of(caller.name)
        usage.prompt_tokens += len(prompt_ids)
        tokens = [0] * request.n
        self._scheduler.spend(unit, len(prompt_ids))
        try:
            async for delta in complete(backend, request, index, prompt_ids, mode):
                generated.inc(len(delta.token_ids))
                tokens[delta.sample_index] += len(delta.token_ids)
                usage.generated_tokens += len(delta.token_ids)
                self._scheduler.spend(unit, len(prompt_ids) + sum(tokens))
                if delta.finish_reason is not None:
                    self._lengths.observe(mode, tokens[delta.sample_index], request.sampling.max_tokens)
                merged.put(delta)
        finally:
            now = time.time()
            unit.part = Part(turn_at - waited, turn_at, now, caller.request_id, len(prompt_ids) + sum(tokens))
            self.metrics.engine_seconds.labels(label, "generate").observe(max(0.0, now - turn_at))
