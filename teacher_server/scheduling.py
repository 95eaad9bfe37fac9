"""Admission and order: how much may wait, whose turn it is, and how much the engine holds at a time.

A call's units (one sequence to score, or one prompt to complete) are admitted together or refused together with
Overloaded. Each lane (scoring, generation) keeps one FIFO queue a client and serves the client that has been given the
least so far, in tokens: a round robin where units are of one size, and fair where they are not. It knows no request,
no engine and no transport.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from protos.errors import Overloaded

RATE_WINDOW_S = 30.0
MIN_RETRY_S, MAX_RETRY_S = 0.2, 60.0


@dataclass(frozen=True)
class Cost:
    """`work`: tokens that the unit keeps the engine busy with, the currency of admission; `load`: tokens that it takes
    of the lane's capacity, or what gives their number when the unit's turn comes."""

    work: int
    load: int | Callable[[], int]


@dataclass(eq=False)
class Unit:
    """One admitted piece of work; await `turn` before giving it to the engine, then `Scheduler.close` it."""

    client: str
    cost: Cost
    lane: Lane
    turn: asyncio.Future[None]
    admitted_at: float
    load: int = 0
    running: bool = False
    closed: bool = False


@dataclass(eq=False)
class _Queue:
    """Waiting units of one client; `served` is its virtual time in tokens."""

    served: float
    units: deque[Unit] = field(default_factory=deque)


class Lane:
    """One kind of work: queues by client, and at most `capacity` tokens submitted unless one unit alone is larger."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.submitted = 0
        self._queues: dict[str, _Queue] = {}
        self._virtual_time = 0.0

    def push(self, unit: Unit) -> None:
        """Appends to the client's queue; a client that was idle starts at the present virtual time."""
        self._queues.setdefault(unit.client, _Queue(self._virtual_time)).units.append(unit)

    def pump(self) -> None:
        """Gives turns while there is room; the next unit in order is never overtaken by a smaller one."""
        while self._queues:
            name, queue = min(self._queues.items(), key=lambda item: item[1].served)
            unit = queue.units[0]
            if not unit.turn.done():
                unit.load = unit.cost.load if isinstance(unit.cost.load, int) else unit.cost.load()
                if self.submitted and self.submitted + unit.load > self.capacity:
                    return
                self._virtual_time = queue.served
                queue.served += unit.load
                self.submitted += unit.load
                unit.running = True
                unit.turn.set_result(None)
            queue.units.popleft()
            if not queue.units:
                del self._queues[name]

    def drop(self, unit: Unit) -> None:
        """Takes back what the unit held: its room if it ran, its place in the queue if it waited."""
        if unit.running:
            self.submitted -= unit.load
            return
        queue = self._queues.get(unit.client)
        if queue is not None and unit in queue.units:
            queue.units.remove(unit)
            if not queue.units:
                del self._queues[unit.client]


class Scheduler:
    """Admits units up to `queue_tokens` of work and `queue_units` of them, running ones included."""

    def __init__(self, queue_tokens: int, queue_units: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.queue_tokens = queue_tokens
        self.queue_units = queue_units
        self.tokens = 0
        """Tokens of work admitted and not finished."""
        self.units = 0
        """Units admitted and not finished."""
        self._clock = clock
        self._finished: deque[tuple[float, int]] = deque()

    def admit(self, lane: Lane, client: str, costs: Iterable[Cost]) -> list[Unit]:
        """Units for all of `costs`, queued in order; Overloaded with a delay where they do not fit beside the others.

        A call that is larger than the whole queue is admitted when nothing else is there.
        """
        costs = list(costs)
        work = sum(cost.work for cost in costs)
        if self.units and (self.tokens + work > self.queue_tokens or self.units + len(costs) > self.queue_units):
            raise Overloaded(
                f"the queue holds {self.tokens} of {self.queue_tokens} tokens and {self.units} of {self.queue_units} "
                f"sequences; {work} tokens in {len(costs)} sequences do not fit now, retry later",
                retry_after_s=self._delay(work, len(costs)),
            )
        now, loop = self._clock(), asyncio.get_running_loop()
        units = [Unit(client, cost, lane, loop.create_future(), now) for cost in costs]
        self.tokens += work
        self.units += len(units)
        for unit in units:
            lane.push(unit)
        lane.pump()
        return units

    def close(self, unit: Unit) -> None:
        """Ends a unit, finished or not; doing it twice is harmless."""
        if unit.closed:
            return
        unit.closed = True
        unit.lane.drop(unit)
        if not unit.turn.done():
            unit.turn.cancel()
        self.tokens -= unit.cost.work
        self.units -= 1
        if unit.running:
            self._finished.append((self._clock(), unit.cost.work))
        unit.lane.pump()

    def follow(self, unit: Unit, task: asyncio.Task[Any]) -> None:
        """Closes a unit when `task` ends, in whatever way, even before it began."""
        task.add_done_callback(lambda _: self.close(unit))

    def waited(self, unit: Unit) -> float:
        """Seconds since admission."""
        return self._clock() - unit.admitted_at

    def _delay(self, work: int, units: int) -> float:
        """Seconds until enough has drained at the rate of the last half minute; 1 where nothing finished in it."""
        now = self._clock()
        while self._finished and self._finished[0][0] < now - RATE_WINDOW_S:
            self._finished.popleft()
        if not self._finished:
            return 1.0
        span = max(now - self._finished[0][0], 0.05)
        tokens_per_s = max(sum(tokens for _, tokens in self._finished) / span, 1e-9)
        units_per_s = len(self._finished) / span
        over_tokens = max(0, self.tokens + work - self.queue_tokens)
        over_units = max(0, self.units + units - self.queue_units)
        return min(MAX_RETRY_S, max(MIN_RETRY_S, over_tokens / tokens_per_s, over_units / units_per_s))
