"""Admission, order and the bound on what the engine holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from protos.errors import Overloaded
from teacher_server.scheduling import Cost, Lane, Scheduler, Unit


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Runs an async test on a loop of its own."""

    def run() -> None:
        asyncio.run(test())

    run.__name__ = test.__name__
    return run


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def costs(*tokens: int) -> list[Cost]:
    """Equal work and load."""
    return [Cost(n, n) for n in tokens]


def running(units: list[Unit]) -> list[bool]:
    """Which units have their turn."""
    return [unit.running for unit in units]


@on_a_loop
async def test_no_more_is_submitted_than_the_lane_holds() -> None:
    scheduler, lane = Scheduler(1000, 100), Lane(100)
    units = scheduler.admit(lane, "a", costs(40, 40, 40, 10))
    assert running(units) == [True, True, False, False], "the small one does not overtake the large one before it"
    scheduler.close(units[0])
    assert running(units[1:]) == [True, True, True]
    assert lane.submitted == 90


@on_a_loop
async def test_a_unit_larger_than_the_lane_runs_alone() -> None:
    scheduler, lane = Scheduler(1000, 100), Lane(10)
    units = scheduler.admit(lane, "a", costs(500, 5))
    assert running(units) == [True, False]
    scheduler.close(units[0])
    assert running(units[1:]) == [True]


@on_a_loop
async def test_clients_take_turns() -> None:
    scheduler, lane = Scheduler(10_000, 1000), Lane(10)
    units = {name: scheduler.admit(lane, name, costs(*[10] * 4)) for name in ("a", "b", "c")}
    order = []
    while left := [(name, unit) for name, queue in units.items() for unit in queue if not unit.closed]:
        name, unit = next((name, unit) for name, unit in left if unit.running)
        order.append(name)
        scheduler.close(unit)
    assert order == ["a", *"bcabcabcabc"]


@on_a_loop
async def test_turns_are_fair_in_tokens_where_sequences_differ() -> None:
    scheduler, lane = Scheduler(100_000, 1000), Lane(10)
    long = scheduler.admit(lane, "long", costs(*[100] * 10))
    short = scheduler.admit(lane, "short", costs(*[10] * 100))
    given = {"long": 0, "short": 0}
    for _ in range(60):
        unit = next(unit for unit in (*long, *short) if unit.running and not unit.closed)
        given[unit.client] += unit.cost.load
        scheduler.close(unit)
    assert abs(given["long"] - given["short"]) <= 100


@on_a_loop
async def test_a_client_that_comes_late_owes_nothing_and_is_owed_nothing() -> None:
    scheduler, lane = Scheduler(100_000, 1000), Lane(10)
    early = scheduler.admit(lane, "early", costs(*[10] * 50))
    for unit in early[:20]:
        scheduler.close(unit)
    late = scheduler.admit(lane, "late", costs(*[10] * 10))
    order = []
    for _ in range(10):
        unit = next(unit for unit in (*early, *late) if unit.running and not unit.closed)
        order.append(unit.client)
        scheduler.close(unit)
    assert 4 <= order.count("late") <= 6


@on_a_loop
async def test_a_load_that_is_not_known_yet_is_asked_for_when_its_turn_comes() -> None:
    scheduler, lane, size = Scheduler(10_000, 100), Lane(100), 60
    units = scheduler.admit(lane, "a", [Cost(60, lambda: size) for _ in range(8)])
    assert sum(running(units)) == 1
    size = 10
    scheduler.close(units[0])
    assert running(units) == [True] * 8  # the first, which took 60, and 7 that take 10 each
    assert lane.submitted == 70
    size = 1000
    for unit in units:
        scheduler.close(unit)
    assert (lane.submitted, scheduler.tokens) == (0, 0)


@on_a_loop
async def test_lanes_do_not_wait_for_each_other() -> None:
    scheduler, score, generate = Scheduler(1000, 100), Lane(10), Lane(10)
    scheduler.admit(generate, "a", costs(10, 10))
    assert running(scheduler.admit(score, "a", costs(10))) == [True]


@on_a_loop
async def test_a_call_is_admitted_whole_or_not_at_all() -> None:
    scheduler, lane = Scheduler(100, 100), Lane(1000)
    scheduler.admit(lane, "a", costs(60))
    with pytest.raises(Overloaded, match="60 of 100 tokens and 1 of 100 sequences; 50 tokens in 2 sequences"):
        scheduler.admit(lane, "b", costs(20, 30))
    assert (scheduler.tokens, scheduler.units) == (60, 1)
    assert running(scheduler.admit(lane, "b", costs(40))) == [True]


@on_a_loop
async def test_too_many_sequences_are_refused_whatever_their_length() -> None:
    scheduler, lane = Scheduler(1000, 3), Lane(1000)
    scheduler.admit(lane, "a", costs(1, 1))
    with pytest.raises(Overloaded):
        scheduler.admit(lane, "a", costs(1, 1))


@on_a_loop
async def test_a_call_larger_than_the_queue_is_admitted_when_nothing_else_is_there() -> None:
    scheduler, lane = Scheduler(100, 100), Lane(1000)
    units = scheduler.admit(lane, "a", costs(500))
    assert running(units) == [True]
    with pytest.raises(Overloaded):
        scheduler.admit(lane, "b", costs(1))


@on_a_loop
async def test_the_delay_comes_from_how_fast_the_queue_drains() -> None:
    clock = Clock()
    scheduler, lane = Scheduler(1000, 100, clock), Lane(10_000)
    units = scheduler.admit(lane, "a", costs(*[100] * 10))
    with pytest.raises(Overloaded) as caught:
        scheduler.admit(lane, "b", costs(300))
    assert caught.value.retry_after_s == 1.0, "nothing has finished yet"
    for unit in units[:2]:
        clock.now += 5
        scheduler.close(unit)
    clock.now += 5
    with pytest.raises(Overloaded) as caught:
        scheduler.admit(lane, "b", costs(500))
    assert caught.value.retry_after_s == pytest.approx(300 / (200 / 10))


@on_a_loop
async def test_what_is_cancelled_while_it_waits_leaves_its_place() -> None:
    scheduler, lane = Scheduler(1000, 100), Lane(10)
    units = scheduler.admit(lane, "a", costs(10, 10, 10))
    scheduler.close(units[1])
    assert units[1].turn.cancelled()
    scheduler.close(units[1])
    scheduler.close(units[0])
    assert running(units) == [True, False, True]
    scheduler.close(units[2])
    assert (scheduler.tokens, scheduler.units, lane.submitted) == (0, 0, 0)


@on_a_loop
async def test_a_task_that_is_cancelled_before_it_began_frees_its_unit() -> None:
    scheduler, lane = Scheduler(1000, 100), Lane(10)
    (unit,) = scheduler.admit(lane, "a", costs(10))

    async def work() -> None:
        await unit.turn

    task = asyncio.create_task(work())
    scheduler.follow(unit, task)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.sleep(0)
    assert (scheduler.tokens, lane.submitted) == (0, 0)
