"""What happened lately, for people: calls and errors as they end, tokens per second, the engine's steps.

All of it is bounded, whatever clients call themselves. It knows no transport, no metric and no page.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from protos.errors import InvalidRequest, TeacherError
from teacher_server.auth import Caller
from teacher_server.backends.steps import KINDS, Step
from teacher_server.status import (
    HISTORY_STEP_S,
    HISTORY_STEPS,
    RATE_S,
    ClientStatus,
    ErrorStatus,
    Latency,
    Rates,
    StepStatus,
)
from teacher_server.usage import OTHERS, Usage, UsageByClient

MOST_CLIENTS = 256
"""Clients that are shown; of more, those that called last."""
MOST_ERRORS = 50
LONGEST_DETAIL = 400
OF_CLIENT, OF_ALL = 128, 2048
"""Calls over which latencies are taken."""
Tokens = tuple[int, int, int]
"""Scored, generated, and known ones, so far."""


@dataclass
class _Client:
    label: str = ""
    transport: str = ""
    in_flight: int = 0
    calls: int = 0
    failed: int = 0
    at: float = 0.0
    seconds: dict[str, deque[float]] = field(default_factory=lambda: {kind: deque(maxlen=OF_CLIENT) for kind in KINDS})
    samples: deque[tuple[float, Tokens]] = field(default_factory=deque)


class Live:
    """See the module. All on the event loop, but `step`."""

    def __init__(self, usage: UsageByClient, clock: Callable[[], float] = time.monotonic) -> None:
        self._usage, self._clock = usage, clock
        self._clients: OrderedDict[str, _Client] = OrderedDict()
        self._errors: deque[ErrorStatus] = deque(maxlen=MOST_ERRORS)
        self._seconds: dict[str, deque[float]] = {kind: deque(maxlen=OF_ALL) for kind in KINDS}
        self._steps: dict[str, deque[Step]] = {kind: deque(maxlen=256) for kind in KINDS}
        self._totals: deque[tuple[float, Tokens]] = deque()
        self._history: deque[Rates] = deque(maxlen=HISTORY_STEPS)
        self._history_at = clock()
        self.sequences: Counter[str] = Counter()
        """Scored sequences by where their scores came from."""

    def began(self, caller: Caller) -> None:
        """A call has begun."""
        client = self._clients.setdefault(caller.name, _Client())
        self._clients.move_to_end(caller.name)
        client.label, client.transport, client.at = caller.label, caller.transport, self._clock()
        client.in_flight += 1
        client.calls += 1
        if len(self._clients) > MOST_CLIENTS:
            idle = next((name for name, one in self._clients.items() if not one.in_flight), None)
            if idle is not None:
                del self._clients[idle]

    def ended(self, method: str, caller: Caller, seconds: float, ok: bool) -> None:
        """A call that began has ended."""
        client = self._clients[caller.name]
        client.in_flight -= 1
        client.at = self._clock()
        if ok and method in self._seconds:
            client.seconds[method].append(seconds)
            self._seconds[method].append(seconds)

    def failed(self, method: str, caller: Caller, error: TeacherError) -> None:
        """A call failed. What an invalid one held is its client's own, and such messages may repeat it."""
        client = self._clients.get(caller.name)
        if client is not None:
            client.failed += 1
        detail = "" if isinstance(error, InvalidRequest) else error.message[:LONGEST_DETAIL]
        self._errors.appendleft(
            ErrorStatus(time.time(), caller.name, method, caller.transport, error.reason, detail, caller.request_id)
        )

    def step(self, step: Step) -> None:
        """The engine has ended a step; may be called in any thread."""
        self._steps[step.kind].append(step)

    def sample(self) -> None:
        """Takes down how many tokens there were so far; to be called about once a second."""
        now, usage = self._clock(), self._usage.all()
        for name, client in self._clients.items():
            _take(client.samples, now, _tokens([usage.get(name, Usage())]))
        _take(self._totals, now, _tokens(usage.values()))
        if now - self._history_at >= HISTORY_STEP_S:
            self._history_at = now
            self._history.append(_rates(self._totals, now, HISTORY_STEP_S))

    @property
    def rates(self) -> Rates:
        """Of all clients together."""
        return _rates(self._totals, self._clock())

    @property
    def history(self) -> list[Rates]:
        """See `Status.history`."""
        return list(self._history)

    @property
    def errors(self) -> list[ErrorStatus]:
        """The last errors, newest first."""
        return list(self._errors)

    def latency(self) -> dict[str, Latency]:
        """Of the last calls of all clients that succeeded, by kind."""
        return {kind: _latency(seconds) for kind, seconds in self._seconds.items()}

    def steps(self) -> dict[str, StepStatus]:
        """The engine's last steps, by kind."""
        return {kind: _steps(tuple(steps)) for kind, steps in self._steps.items()}

    def last_step_s(self) -> float | None:
        """Seconds since the engine ended a step."""
        ends = [steps[-1].began + (steps[-1].seconds or 0.0) for steps in self._steps.values() if steps]
        return max(0.0, time.time() - max(ends)) if ends else None

    def clients(self, waiting: Mapping[str, int]) -> list[ClientStatus]:
        """Every client, those with most work first; `waiting` are tokens admitted and not finished."""
        now, usage = self._clock(), self._usage.all()
        found = [
            ClientStatus(
                name=name,
                label=client.label,
                transport=client.transport,
                in_flight=client.in_flight,
                waiting_tokens=waiting.get(name, 0),
                calls=client.calls,
                failed=client.failed,
                idle_s=max(0.0, now - client.at),
                rates=_rates(client.samples, now),
                known_share=_known_share(usage.get(name, Usage())),
                score=_latency(client.seconds["score"]),
                generate=_latency(client.seconds["generate"]),
            )
            for name, client in self._clients.items()
            if name != OTHERS
        ]
        return sorted(found, key=lambda c: (-bool(c.in_flight), -sum(vars(c.rates).values()), c.idle_s))


def _tokens(usages: Iterable[Usage]) -> Tokens:
    scored = generated = known = 0
    for usage in usages:
        scored += usage.scored_tokens
        generated += usage.generated_tokens
        known += usage.cached_tokens + usage.joined_tokens
    return scored, generated, known


def _take(samples: deque[tuple[float, Tokens]], now: float, tokens: Tokens) -> None:
    """Appends a sample, and drops those that no rate needs; equal ones in a row are kept once at either end."""
    if len(samples) > 1 and samples[-1][1] == samples[-2][1] == tokens:
        samples.pop()
    samples.append((now, tokens))
    while len(samples) > 2 and samples[1][0] <= now - RATE_S:
        samples.popleft()


def _rates(samples: deque[tuple[float, Tokens]], now: float, seconds: float = RATE_S) -> Rates:
    """What came in the last `seconds`; the newest sample that is older than that is where it begins."""
    if len(samples) < 2:
        return Rates()
    begin = next((one for one in reversed(samples) if one[0] <= now - seconds), samples[0])
    end, span = samples[-1], min(seconds, max(1.0, samples[-1][0] - begin[0]))
    return Rates(*(max(0.0, (last - first) / span) for first, last in zip(begin[1], end[1], strict=True)))


def _latency(seconds: deque[float]) -> Latency:
    ordered = sorted(seconds)
    if not ordered:
        return Latency(0, None, None, None)
    p50, p90, p99 = (ordered[min(len(ordered) - 1, int(share * len(ordered)))] for share in (0.5, 0.9, 0.99))
    return Latency(len(ordered), p50, p90, p99)


def _known_share(usage: Usage) -> float | None:
    known = usage.cached_tokens + usage.joined_tokens
    return known / (known + usage.scored_tokens) if known + usage.scored_tokens else None


def _steps(steps: tuple[Step, ...]) -> StepStatus:
    n = max(1, len(steps))
    seconds = sum(step.seconds or 0.0 for step in steps)
    return StepStatus(
        steps=len(steps),
        sequences=sum(step.sequences for step in steps) / n,
        tokens=sum(step.tokens for step in steps) / n,
        seconds=seconds / n,
        readout_share=sum(step.readout_s for step in steps) / seconds if seconds else 0.0,
    )
