"""Keys, the bound of the cache, and computations that several wait for."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from protos.scores import Field, Scores, ScoreSpec, Sequence
from teacher_server.cache import Flights, ScoreCache, score_key
from teacher_server.scheduling import Cost, Lane, Scheduler

BASE = ("fingerprint", Sequence([1, 2, 3], 1, [[4, 5], [6, 7]]), ScoreSpec(2, (1.0, 2.0)))


@pytest.mark.parametrize(
    "other",
    [
        ("another", BASE[1], BASE[2]),
        (BASE[0], Sequence([1, 2, 4], 1, [[4, 5], [6, 7]]), BASE[2]),
        (BASE[0], Sequence([1, 2, 3], 2, [[4, 5]]), BASE[2]),
        (BASE[0], Sequence([1, 2, 3], 1, [[4, 5], [7, 6]]), BASE[2]),
        (BASE[0], Sequence([1, 2, 3], 1, [[4], [6]]), BASE[2]),
        (BASE[0], Sequence([1, 2, 3]), BASE[2]),
        (BASE[0], BASE[1], ScoreSpec(3, (1.0, 2.0))),
        (BASE[0], BASE[1], ScoreSpec(2, (2.0, 1.0))),
        (BASE[0], BASE[1], ScoreSpec(2, (1.0,))),
        (BASE[0], BASE[1], ScoreSpec(2, (1.0, 2.0), frozenset({Field.TOP}))),
    ],
)
def test_all_that_a_score_depends_on_is_in_its_key(other: tuple[str, Sequence, ScoreSpec]) -> None:
    assert score_key(*other) != score_key(*BASE)


def test_equal_work_has_one_key_however_it_was_asked_for() -> None:
    explicit = ScoreSpec(2, (1.0, 2.0), frozenset(Field) - {Field.HIDDEN_STATES})
    assert score_key(BASE[0], Sequence(np.array([1, 2, 3]), 1, [[4, 5], [6, 7]]), explicit) == score_key(*BASE)


def scores(n: int, value: float = 0.0) -> Scores:
    """4 n bytes."""
    return Scores(token_logprobs=np.full(n, value, np.float32))


def test_the_least_recently_used_goes_first() -> None:
    cache = ScoreCache(400)
    for key in (b"a", b"b", b"c", b"d"):
        cache.put(key, scores(25))
    assert cache.get(b"a") is not None
    cache.put(b"e", scores(25))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    assert (len(cache), cache.nbytes) == (4, 400)


def test_what_is_larger_than_the_cache_is_not_kept_and_drives_nothing_out() -> None:
    cache = ScoreCache(400)
    cache.put(b"a", scores(25))
    cache.put(b"b", scores(101))
    assert cache.get(b"b") is None
    assert cache.get(b"a") is not None
    empty = ScoreCache(0)
    empty.put(b"a", scores(1))
    assert (len(empty), empty.nbytes) == (0, 0)


def test_putting_again_counts_once() -> None:
    cache = ScoreCache(400)
    cache.put(b"a", scores(25))
    cache.put(b"a", scores(50, -1.0))
    assert cache.nbytes == 200
    found = cache.get(b"a")
    assert found is not None
    assert found.positions == 50


def test_a_view_of_a_batch_does_not_keep_the_batch() -> None:
    cache = ScoreCache(400)
    batch = np.zeros(1_000_000, np.float32)
    cache.put(b"a", Scores(token_logprobs=batch[:10]))
    found = cache.get(b"a")
    assert found is not None
    assert found.token_logprobs is not None
    assert found.token_logprobs.base is None


def test_only_the_last_waiter_cancels_a_flight() -> None:
    async def main() -> None:
        flights, begun = Flights(), asyncio.Event()

        async def work() -> Scores:
            begun.set()
            await asyncio.sleep(60)
            return scores(1)

        scheduler, lane = Scheduler(100, 100), Lane(100)
        (unit,) = scheduler.admit(lane, "a", [Cost(1, 1)])
        flight = flights.start(b"k", work(), unit)
        assert b"k" in flights
        assert flights.join(b"k") is flight
        await begun.wait()
        flights.leave(flight)
        await asyncio.sleep(0)
        assert not flight.task.done()
        flights.leave(flight)
        assert b"k" not in flights, "nobody joins what is being cancelled"
        other = flights.start(b"k", work(), unit)
        await asyncio.sleep(0.01)
        assert flight.task.cancelled()
        assert b"k" in flights, "the end of the old flight does not remove the new one"
        flights.leave(other)
        await asyncio.sleep(0.01)
        assert len(flights) == 0

    asyncio.run(main())
