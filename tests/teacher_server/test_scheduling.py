"""Admission, order and the bound on what the engine holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from protos.errors import Overloaded
from teacher_server.fairness import QUANTUM
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


async def served(units: dict[str, list[Unit]], scheduler: Scheduler, turns: int) -> list[str]:
    """Whose units run, one after the other, over that many turns of a lane that holds one unit."""
    order = []
    for _ in range(turns):
        unit = next(unit for queue in units.values() for unit in queue if unit.running and not unit.closed)
        order.append(unit.payer)
        scheduler.close(unit)
    return order


@on_a_loop
async def test_clients_take_turns() -> None:
    scheduler, lane = Scheduler(100_000, 1000), Lane(100)
    units = {name: scheduler.admit(lane, name, costs(*[100] * 10)) for name in "abc"}
    order = await served(units, scheduler, 30)
    for end in range(1, 28):
        counts = [order[:end].count(name) for name in "abc"]
        assert max(counts) - min(counts) <= 2, order


@on_a_loop
async def test_turns_are_fair_in_tokens_where_sequences_differ() -> None:
    scheduler, lane = Scheduler(1_000_000, 1000), Lane(10)
    units = {"long": scheduler.admit(lane, "long", costs(*[1000] * 10))}
    units["short"] = scheduler.admit(lane, "short", costs(*[100] * 100))
    order = await served(units, scheduler, 80)
    assert abs(order.count("long") * 1000 - order.count("short") * 100) <= 1000 + QUANTUM


@on_a_loop
async def test_a_client_gets_its_weight_of_the_tokens() -> None:
    scheduler, lane = Scheduler(1_000_000, 1000), Lane(10)
    units = {"one": scheduler.admit(lane, "one", costs(*[100] * 100))}
    units["three"] = scheduler.admit(lane, "three", costs(*[100] * 100), weight=3.0)
    order = await served(units, scheduler, 80)
    assert order.count("three") == pytest.approx(60, abs=2)


@on_a_loop
async def test_a_client_that_comes_late_owes_nothing_and_is_owed_nothing() -> None:
    scheduler, lane = Scheduler(1_000_000, 1000), Lane(10)
    units = {"early": scheduler.admit(lane, "early", costs(*[100] * 50))}
    await served(units, scheduler, 20)
    units["late"] = scheduler.admit(lane, "late", costs(*[100] * 10))
    order = await served(units, scheduler, 10)
    assert 4 <= order.count("late") <= 6


@on_a_loop
async def test_a_client_that_comes_and_goes_pays_for_its_last_long_sequence_first() -> None:
    """One long sequence at a time, asked for again when it is done, is no way to more than one's part."""
    scheduler, lane = Scheduler(1_000_000, 1000), Lane(10)
    units = {"busy": scheduler.admit(lane, "busy", costs(*[100] * 300))}
    given = {"busy": 0, "comes and goes": 0}
    for _ in range(200):
        if all(unit.closed for unit in units.get("comes and goes", [])):
            units["comes and goes"] = scheduler.admit(lane, "comes and goes", costs(1000))
        running = next(unit for queue in units.values() for unit in queue if unit.running and not unit.closed)
        given[running.payer] += running.load
        scheduler.close(running)
    assert abs(given["busy"] - given["comes and goes"]) <= 2000, given


@on_a_loop
async def test_both_lanes_are_paid_from_one_account() -> None:
    """What generates and scores gets no more in all than what scores alone, each lane being fair for itself or not."""
    scheduler, score, generate = Scheduler(1_000_000, 10_000), Lane(100), Lane(100)
    both = scheduler.admit(score, "both", costs(*[100] * 500))
    both += [scheduler.admit_late(generate, "both", cost) for cost in costs(*[100] * 100)]
    alone = scheduler.admit(score, "alone", costs(*[100] * 500))
    given = {"both": 0, "alone": 0}
    for _ in range(60):  # each lane finishes one unit at a time
        for unit in [unit for unit in (*both, *alone) if unit.running and not unit.closed]:
            given[unit.payer] += unit.load
            scheduler.close(unit)
    assert abs(given["both"] - given["alone"]) <= 300, given


@on_a_loop
async def test_a_generation_costs_what_it_really_produced() -> None:
    """Two clients expect 1000 tokens of each prompt; one's completions end after 100."""
    scheduler, lane = Scheduler(10_000_000, 10_000), Lane(1000)
    units = {name: scheduler.admit(lane, name, costs(*[1000] * 500)) for name in ("short", "long")}
    real = {"short": 100, "long": 1000}
    given = {"short": 0, "long": 0}
    for _ in range(220):
        unit = next(unit for queue in units.values() for unit in queue if unit.running and not unit.closed)
        for tokens in range(0, real[unit.payer] + 1, 50):
            scheduler.spend(unit, tokens)
        given[unit.payer] += real[unit.payer]
        scheduler.close(unit)
    assert abs(given["short"] - given["long"]) <= 2000, given
    assert given["long"] > 10_000


@on_a_loop
async def test_more_than_was_expected_is_charged_as_it_comes() -> None:
    scheduler, lane = Scheduler(1_000_000, 10_000), Lane(1000)
    (endless,) = scheduler.admit(lane, "endless", costs(1000))
    endless.load = lane.submitted = 0  # room for others beside it
    scheduler.spend(endless, 50_000)
    other = scheduler.admit(lane, "other", costs(*[500] * 10))
    mine = scheduler.admit(lane, "endless", costs(*[500] * 10))
    order = await served({"other": other, "endless": mine}, scheduler, 11)
    assert order == [*["other"] * 10, "endless"], "its debt is let go once nobody else waits"


@on_a_loop
async def test_who_joins_a_waiting_computation_does_not_wait_in_the_others_queue() -> None:
    scheduler, lane = Scheduler(1_000_000, 10_000), Lane(10)
    greedy = scheduler.admit(lane, "greedy", costs(*[100] * 100))
    scheduler.claim(greedy[99], "modest")
    scheduler.claim(greedy[0], "modest")
    order = await served({"greedy": greedy}, scheduler, 3)
    assert greedy[99].closed
    assert order.count("modest") == 1
    for unit in greedy:
        scheduler.close(unit)
    assert (scheduler.tokens, lane.submitted, len(scheduler._ledger)) == (0, 0, 0)


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
    with pytest.raises(
        Overloaded, match=r"60 of 100 tokens and 1 of 100 sequences, 0 and 0 .* 50 tokens in 2 sequences"
    ):
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
    assert caught.value.retry_after_s == pytest.approx(300 / (200 / 15))


@on_a_loop
async def test_hours_of_idleness_do_not_slow_the_measured_rate() -> None:
    clock = Clock()
    scheduler, lane = Scheduler(1000, 100, clock), Lane(10_000)
    for _ in range(3):
        (unit,) = scheduler.admit(lane, "a", costs(900))
        clock.now += 2
        scheduler.close(unit)
        clock.now += 3600
    scheduler.admit(lane, "a", costs(900))
    with pytest.raises(Overloaded) as caught:
        scheduler.admit(lane, "b", costs(1000))
    assert caught.value.retry_after_s == pytest.approx(900 / 450)


@on_a_loop
async def test_one_client_cannot_fill_the_queue() -> None:
    """However much one sends, the next client gets in, and each of n as much as the others."""
    scheduler, lane = Scheduler(1000, 1000), Lane(10)
    admitted: dict[str, int] = {}
    for name in ("greedy", *"abcdefgh"):
        admitted[name] = 0
        for _ in range(640 if name == "greedy" else 10):
            try:
                scheduler.admit(lane, name, costs(10))
            except Overloaded:
                break
            admitted[name] += 10
    assert admitted["greedy"] == 500
    assert all(admitted[name] >= 10 for name in "abcdefgh"), admitted
    assert scheduler.tokens <= 1000


@on_a_loop
async def test_a_heavier_client_may_have_more_waiting() -> None:
    def most(weight: float) -> int:
        scheduler, lane = Scheduler(1000, 1000), Lane(10)
        while True:
            try:
                scheduler.admit(lane, "a", costs(10), weight)
            except Overloaded:
                return scheduler.tokens

    assert (most(1.0), most(3.0)) == (500, 750)


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
