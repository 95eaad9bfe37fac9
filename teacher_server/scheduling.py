"""Admission and order: how much may wait, whose turn it is, and how much the engine holds at a time.

A call's units (one sequence to score, or one prompt to complete) are admitted together or refused together with
Overloaded. Each lane (scoring, generation) keeps one FIFO queue a client and as much submitted as its engine needs to
be busy and no more; `fairness.py` says which client is next, `sharing.py` how much each may have waiting. It knows no
request, no engine and no transport.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from protos.errors import Overloaded
from teacher_server.fairness import Ledger
from teacher_server.sharing import Pool
from teacher_server.traces import Part

Tokens = int | Callable[[], int]
"""A number of tokens, or what gives it when the unit's turn comes."""


@dataclass(frozen=True)
class Cost:
    """What a unit takes, in tokens.

    `work` keeps the engine busy and is the currency of admission; `load` is taken of the lane's capacity, and `charge`
    of the client's account when its turn comes (None: as much as `load`).
    """

    work: int
    load: Tokens
    charge: Tokens | None = None
    rows: int = 0
    """Completions that run at the same time."""


@dataclass(eq=False)
class Unit:
    """One admitted piece of work; await `turn` before giving it to the engine, then `Scheduler.close` it."""

    client: str
    cost: Cost
    lane: Lane
    turn: asyncio.Future[None]
    admitted_at: float
    claims: list[str] = field(default_factory=list)
    """Clients in whose queues it waits; empty once it runs."""
    payer: str = ""
    """The client whose turn it took; empty until it runs."""
    load: int = 0
    charged: int = 0
    began_for: int = 0
    """What it was charged when it began."""
    spent: int | None = None
    closed: bool = False
    part: Part | None = None
    """What became of it, once it has been with the engine; for whoever traces calls."""

    @property
    def running(self) -> bool:
        """Whether it has had its turn."""
        return bool(self.payer)


class Lane:
    """One kind of work: queues by client, and at most `capacity` tokens submitted unless one unit alone is larger."""

    def __init__(self, capacity: int, yields: bool = False) -> None:
        self.capacity = capacity
        self.yields = yields
        """Whether it is not filled on credit while others wait for work of another kind that has no room now."""
        self.submitted = 0
        self.rows = 0
        """Completions that run."""
        self.full = math.inf
        """Completions with which the engine is as fast as it gets; see `Ledger.turns`."""
        self.queues: OrderedDict[str, OrderedDict[Unit, None]] = OrderedDict()
        """Waiting units by client, the client next in turn first; no queue is empty."""

    def push(self, name: str, unit: Unit) -> None:
        """Appends to a client's queue."""
        unit.claims.append(name)
        self.queues.setdefault(name, OrderedDict())[unit] = None

    def take(self, unit: Unit) -> list[str]:
        """Removes a unit from every queue; those were the queues of these clients."""
        claims, unit.claims = unit.claims, []
        for name in claims:
            del self.queues[name][unit]
            if not self.queues[name]:
                del self.queues[name]
        return claims


class Scheduler:
    """Admits units up to `queue_tokens` of work and `queue_units` of them, running ones included."""

    def __init__(self, queue_tokens: int, queue_units: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._tokens = Pool(queue_tokens, clock)
        self._units = Pool(queue_units, clock)
        self._ledger = Ledger()
        self._lanes: list[Lane] = []

    @property
    def tokens(self) -> int:
        """Tokens of work admitted and not finished."""
        return self._tokens.held

    @property
    def units(self) -> int:
        """Units admitted and not finished."""
        return self._units.held

    @property
    def tokens_by_client(self) -> dict[str, int]:
        """Tokens of work admitted and not finished, of each client that has some."""
        return dict(self._tokens.by_client)

    def admit(self, lane: Lane, client: str, costs: Iterable[Cost], weight: float = 1.0) -> list[Unit]:
        """Units for all of `costs`, queued in order; Overloaded where they do not fit beside what is there.

        Its delay is the time in which, at the rate of the last half minute of work, enough is finished.
        """
        costs = list(costs)
        work = sum(cost.work for cost in costs)
        tokens = self._tokens.excess(client, weight, work)
        units = self._units.excess(client, weight, len(costs))
        if tokens or units:
            own = self._tokens.by_client.get(client, 0), self._units.by_client.get(client, 0)
            raise Overloaded(
                f"the queue holds {self.tokens} of {self._tokens.limit} tokens and {self.units} of {self._units.limit} "
                f"sequences, {own[0]} and {own[1]} of them this client's; {work} tokens in {len(costs)} sequences do "
                "not fit now, retry later",
                retry_after_s=max(self._tokens.delay(tokens), self._units.delay(units)),
            )
        return self._enqueue(lane, client, costs, weight)

    def admit_late(self, lane: Lane, client: str, cost: Cost, weight: float = 1.0) -> Unit:
        """A unit of a call that is in progress already and cannot be refused any more."""
        return self._enqueue(lane, client, [cost], weight)[0]

    def _enqueue(self, lane: Lane, client: str, costs: list[Cost], weight: float) -> list[Unit]:
        now, loop = self._clock(), asyncio.get_running_loop()
        units = [Unit(client, cost, lane, loop.create_future(), now) for cost in costs]
        for unit in units:
            self._tokens.take(client, unit.cost.work)
            self._units.take(client, 1)
            lane.push(client, unit)
            self._ledger.waits(client, weight)
        if lane not in self._lanes:
            self._lanes.append(lane)
        self._pump()
        return units

    def claim(self, unit: Unit, client: str, weight: float = 1.0) -> None:
        """Lets a unit that waits also wait in another client's queue, whose turn may come first and then pays."""
        if unit.claims and client not in unit.claims:
            unit.lane.push(client, unit)
            self._ledger.waits(client, weight)
            self._pump()

    def spend(self, unit: Unit, tokens: int) -> None:
        """What a running unit has really cost so far; only then is it corrected at the end, down as well as up."""
        unit.spent = tokens
        if tokens > unit.charged:
            self._ledger.charge(unit.payer, tokens - unit.charged)
            unit.charged = tokens

    def close(self, unit: Unit) -> None:
        """Ends a unit, finished or not; doing it twice is harmless."""
        if unit.closed:
            return
        unit.closed = True
        if unit.running:
            unit.lane.submitted -= unit.load
            unit.lane.rows -= unit.cost.rows
            if unit.spent is not None:
                self._ledger.charge(unit.payer, unit.spent - unit.charged)
            self._ledger.ends(unit.payer, unit.began_for)
        for name in unit.lane.take(unit):
            self._ledger.leaves(name)
        if not unit.turn.done():
            unit.turn.cancel()
        self._tokens.give(unit.client, unit.cost.work, finished=unit.running)
        self._units.give(unit.client, 1, finished=unit.running)
        self._pump()

    def follow(self, unit: Unit, task: asyncio.Task[Any]) -> None:
        """Closes a unit when `task` ends, in whatever way, even before it began."""
        task.add_done_callback(lambda _: self.close(unit))

    def waited(self, unit: Unit) -> float:
        """Seconds since admission."""
        return self._clock() - unit.admitted_at

    def _pump(self) -> None:
        """Gives turns while there is room."""
        for lane in self._lanes:
            while self._step(lane):
                pass

    def _step(self, lane: Lane) -> bool:
        """Gives one turn, or finds that nobody may have one now."""
        if not lane.queues or (lane.submitted and lane.submitted >= lane.capacity):
            return False
        for name in self._ledger.turns(lane.queues, lane.yields, lane.rows >= lane.full):
            unit = next(iter(lane.queues[name]))
            if unit.turn.done():  # who waited for it went away, and its end is about to be told
                for claim in lane.take(unit):
                    self._ledger.leaves(claim)
                return True
            load = _tokens(unit.cost.load)
            if not lane.submitted or lane.submitted + load <= lane.capacity:
                self._begin(unit, name, load)
                return True
        return False

    def _begin(self, unit: Unit, name: str, load: int) -> None:
        lane = unit.lane
        lane.queues.move_to_end(name)
        for claim in lane.take(unit):
            if claim != name:
                self._ledger.leaves(claim)
        unit.payer, unit.load = name, load
        unit.charged = unit.began_for = load if unit.cost.charge is None else _tokens(unit.cost.charge)
        lane.submitted += load
        lane.rows += unit.cost.rows
        self._ledger.begins(name, unit.charged)
        unit.turn.set_result(None)


def _tokens(number: Tokens) -> int:
    return number if isinstance(number, int) else number()
