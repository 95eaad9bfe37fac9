"""A teacher whose answers are known by theory, for tests of everything above a backend; needs numpy alone.

It is the chain of `theory.py` over the bytes of `byte_text.py`, with a speed that tests can set and several ways to
fail on purpose. It keeps every promise of `base.Backend`, cancellation included.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

import numpy as np

from protos.errors import TeacherFailed, Unavailable
from protos.head import Head
from protos.scores import Field, FinishReason, Ids, Mode, Sampling, Scores, ScoreSpec, Sequence, TeacherInfo
from teacher_server.backends.base import Piece, Room, limits
from teacher_server.backends.byte_text import ByteText
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.randomness import generator
from teacher_server.backends.steps import Kind, Observer, Step, nobody, note
from teacher_server.backends.theory import Array, Ring
from teacher_server.backends.thinking import CLOSING_TEXT, ThinkBudget, ThinkTags

ENGINE = "theoretical 1"


@dataclass(frozen=True)
class Behaviour:
    """What a test sets beside the options.

    `kappa` is the chain's certainty. `tokens_per_second` (None is as fast as it goes) and `latency_s` (added to each
    call) are its speed; calls share the one engine, so they queue for the tokens. A sequence or prompt that holds
    `failing_id` gives TeacherFailed, `hanging_id` never answers, `crashing_id` takes the engine down: from then on it
    is unhealthy and every call, those in flight too, fails with Unavailable. `vanishing_id` takes it down in silence:
    it is unhealthy and no call is answered any more; with `freezing_id` it does not even say whether it is healthy.
    `close_s` is how long its end takes, `broken` why it does not start.
    """

    kappa: float = 3.0
    tokens_per_second: float | None = None
    latency_s: float = 0.0
    failing_id: int | None = None
    hanging_id: int | None = None
    crashing_id: int | None = None
    vanishing_id: int | None = None
    freezing_id: int | None = None
    close_s: float = 0.0
    broken: str = ""


@dataclass
class Counters:
    """What it did, for tests to look at: calls begun and cancelled, tokens scored and generated, steps."""

    scored: int = 0
    generated: int = 0
    cancelled: int = 0
    score_tokens: int = 0
    new_tokens: int = 0
    steps: int = 0
    score_order: list[int] = field(default_factory=list)
    """Number of tokens of each scored sequence, in the order in which they were submitted."""


class TheoreticalBackend:
    """A `base.Backend` over the ring of `theory.Ring`; `counters` may be read at any time."""

    def __init__(self, options: BackendOptions, behaviour: Behaviour | None = None) -> None:
        self._options = options
        self.behaviour = behaviour or Behaviour()
        self.counters = Counters()
        self.text = ByteText()
        self.ring = Ring(self.text.vocab_size, self.behaviour.kappa)
        self._tags = ThinkTags(
            self.text.think_open, self.text.think_close, tuple(int(i) for i in self.text.encode(CLOSING_TEXT))
        )
        self._eos = frozenset(self.text.eos_token_ids)
        self._down: asyncio.Event | None = None
        self._gone = self._frozen = False
        self._free_at = 0.0
        self._observer: Observer = nobody

    def observe(self, observer: Observer) -> None:
        """Tells `observer` each time that tokens were spent."""
        self._observer = observer

    @property
    def info(self) -> TeacherInfo:
        """What GetTeacher answers."""
        options, text = self._options, self.text
        parts = f"{ENGINE} {text.tokenizer_hash} {text.template_hash} {self.behaviour.kappa!r}"
        longest = options.max_sequence_tokens or 32768
        return TeacherInfo(
            name=options.served_name,
            fingerprint=hashlib.sha256(parts.encode()).hexdigest(),
            tokenizer_hash=text.tokenizer_hash,
            template_hash=text.template_hash,
            vocab_size=text.vocab_size,
            normalized_size=text.vocab_size,
            eos_token_ids=text.eos_token_ids,
            limits=limits(options, text.vocab_size, longest),
            modes=text.modes,
            fields=frozenset(Field),
            can_generate=True,
            engine=ENGINE,
            dtype="float64",
            quantization="none",
            hidden_size=2,
            hidden_dtype="float32",
        )

    @property
    def batch_tokens(self) -> int:
        """Tokens of one step; only what the service makes of it depends on this."""
        return self._options.batch_tokens

    @property
    def generation_room(self) -> Room:
        """Four steps' tokens, as many completions as one step has."""
        return Room(4 * self._options.batch_tokens, self._options.batch_tokens)

    @property
    def steps(self) -> int:
        """Times that tokens were spent."""
        return self.counters.steps

    async def start(self) -> None:
        """Needs no time; ValueError where it is broken."""
        if self.behaviour.broken:
            raise ValueError(self.behaviour.broken)
        self._down = asyncio.Event()

    async def score(self, sequence: Sequence, spec: ScoreSpec) -> Scores:
        """The exact scores, rounded to float32."""
        self.counters.scored += 1
        self.counters.score_order.append(len(sequence.token_ids))
        try:
            note(await self._spend("score", sequence.token_ids, len(sequence.token_ids), self.behaviour.latency_s))
        except asyncio.CancelledError:
            self.counters.cancelled += 1
            raise
        self.counters.score_tokens += len(sequence.token_ids)
        return self.ring.score(sequence, spec)

    async def head(self, rows: int) -> AsyncIterator[Head]:
        """The ring's two columns."""
        for part in Head(self.ring.head(), "float32").parts(rows):
            yield part

    async def generate(
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
        """Samples of the chain; the n completions grow together, one token each a step."""
        self.counters.generated += 1
        rows = [self._completion(prompt_ids, sampling, i) for i in range(n)]
        try:
            await self._spend("generate", prompt_ids, len(prompt_ids), self.behaviour.latency_s)
            while alive := [row for row in rows if row.reason is None and row.index not in dropped]:
                await self._spend("generate", prompt_ids, len(alive), 0.0, rows=len(alive))
                for row in alive:
                    row.step(self.ring)
                self.counters.new_tokens += len(alive)
                pieces = [
                    row.piece(self.ring, logprobs, alternatives) for row in alive if stream or row.reason is not None
                ]
                if pieces:
                    yield pieces
        except (asyncio.CancelledError, GeneratorExit):
            self.counters.cancelled += 1
            raise

    def _completion(self, prompt_ids: Ids, sampling: Sampling, index: int) -> _Completion:
        room = self.info.limits.sequence_tokens - len(prompt_ids)
        budget = None
        if sampling.max_thinking_tokens:
            budget = ThinkBudget.after(prompt_ids, self._tags, sampling.max_thinking_tokens)
        return _Completion(
            index,
            int(prompt_ids[-1]),
            sampling,
            stops=frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else self._eos),
            most=max(1, min(sampling.max_tokens, room)),
            budget=budget,
            generator=generator(sampling.seed, prompt_ids, index),
        )

    async def healthy(self) -> bool:
        """False after a crash and before start."""
        if self._frozen:
            await _for_ever()
        return self._down is not None and not self._down.is_set() and not self._gone

    def vanish(self) -> None:
        """Dies in silence, as at `vanishing_id`."""
        self._gone = True

    async def close(self) -> None:
        """Fails what is in flight with Unavailable."""
        await asyncio.sleep(self.behaviour.close_s)
        if self._down is not None:
            self._down.set()

    async def _spend(self, kind: Kind, ids: Ids, tokens: int, latency_s: float, rows: int = 1) -> Step:
        """Waits for its turn and its tokens; fails on purpose where the ids ask for it."""
        if self._down is None or self._down.is_set():
            raise Unavailable("the teacher's engine is down", retry_after_s=1.0)
        asked = self.behaviour
        if asked.crashing_id is not None and asked.crashing_id in ids:
            self._down.set()
        if asked.failing_id is not None and asked.failing_id in ids:
            raise TeacherFailed
        if asked.vanishing_id is not None and asked.vanishing_id in ids:
            self.vanish()
        if asked.freezing_id is not None and asked.freezing_id in ids:
            self.vanish()
            self._frozen = True
        if self._gone:
            await _for_ever()
        loop = asyncio.get_running_loop()
        rate = asked.tokens_per_second
        turn_in = max(0.0, self._free_at - loop.time())
        self._free_at = max(self._free_at, loop.time()) + (tokens / rate if rate else 0.0)
        step = Step(kind, rows, tokens, time.time() + turn_in)
        wait: float | None = self._free_at - loop.time() + latency_s
        if asked.hanging_id is not None and asked.hanging_id in ids:
            wait = None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._down.wait(), wait) if wait is None or wait > 0 else await asyncio.sleep(0)
        if self._gone:
            await _for_ever()
        if self._down.is_set():
            raise Unavailable("the teacher's engine is down", retry_after_s=1.0)
        self.counters.steps += 1
        step.end()
        if rate:
            step.seconds = tokens / rate  # whenever the loop woke up
        self._observer(step)
        return step


async def _for_ever() -> None:
    await asyncio.Event().wait()


@dataclass
class _Completion:
    """One completion while it grows."""

    index: int
    prompt_end: int
    sampling: Sampling
    stops: frozenset[int]
    most: int
    budget: ThinkBudget | None
    generator: np.random.Generator
    reason: FinishReason | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sent: int = 0

    @property
    def last(self) -> int:
        """The token that the next one follows."""
        return self.tokens[-1] if self.tokens else self.prompt_end

    def step(self, ring: Ring) -> None:
        """Draws one token."""
        l_V = ring.logprobs(np.array([self.last], dtype=np.int32))[0]
        forced = -1 if self.budget is None else self.budget.forced()
        drawn = draw(l_V, self.sampling, float(self.generator.random()))
        token = forced if forced >= 0 else drawn
        if self.budget is not None:
            self.budget.observe(token)
        self.tokens.append(token)
        self.logprobs.append(float(l_V[token]))
        if token in self.stops:
            self.reason = FinishReason.STOP
        elif len(self.tokens) >= self.most:
            self.reason = FinishReason.LENGTH

    def piece(self, ring: Ring, logprobs: bool, alternatives: int) -> Piece:
        """What has not been sent yet."""
        first, self.sent = self.sent, len(self.tokens)
        ids = np.array(self.tokens[first:], dtype=np.int32)
        numbers = np.array(self.logprobs[first:], dtype=np.float32) if logprobs else None
        if not alternatives:
            return Piece(self.index, ids, numbers, self.reason)
        before = self.tokens[first - 1] if first else self.prompt_end
        top = ring.score(Sequence(np.array([before, *ids])), ScoreSpec(alternatives, want=frozenset({Field.TOP})))
        return Piece(self.index, ids, numbers, self.reason, top.top_token_ids, top.top_logprobs)


def draw(l_V: Array, sampling: Sampling, uniform: float) -> int:
    """One token of float64[V] log-probabilities by inverse distribution, most likely tokens first."""
    order = np.argsort(-l_V, kind="stable")
    if sampling.temperature == 0:
        return int(order[0])
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = l_V[order] / sampling.temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    before = np.cumsum(p) - p
    kept = p * (before < sampling.top_p) if sampling.top_p < 1 else p
    cdf = np.cumsum(kept)
    return int(order[min(int(np.searchsorted(cdf, uniform * cdf[-1], side="right")), len(order) - 1)])
