"""Rollouts under way as a file of a checkpoint: what arrived is kept, what did not is asked for again."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.scores import Mode, Scores
from student_trainer import in_flight
from student_trainer.batches import Row
from student_trainer.in_flight import Asked, Flight
from student_trainer.schedule import Step
from student_trainer.teachers import Pending

K = 3


def score(row: Row, seed: int = 0) -> Scores:
    t, numbers = len(row.ids) - row.start, np.random.default_rng((seed, *row.ids))
    ids = numbers.integers(0, 9, (t, K), dtype=np.int32)
    return Scores(
        numbers.random(t, np.float32),
        ids,
        numbers.random((t, K), np.float32),
        log_normalizer=numbers.random((t, 2), np.float32),
        tail_logprob=numbers.random((t, 2), np.float32),
    )


def pending(*scores: Scores, place: int = 0, error: Exception | None = None) -> Pending:
    future: Future[list[Scores]] = Future()
    if error is not None:
        future.set_exception(error)
    elif scores:
        future.set_result(list(scores))
    return Pending(future, place)


def flights(extra: bool) -> list[Flight]:
    """Two steps; of the rollouts 0 and 3 have scores, 1 has none yet, 2 failed."""
    numbers, asked = np.random.default_rng(1), list[Asked]()
    for i, length in enumerate((7, 4, 9, 5)):
        row = Row(numbers.integers(0, 9, length, dtype=np.int32), 2, f"row {i}", (Mode.THINKING, None)[i % 2], "maths")
        candidates = numbers.integers(0, 9, (length - 2, K), dtype=np.int32) if extra else None
        logprobs = numbers.random(length - 2, np.float32) if extra else None
        asked.append(Asked(row, candidates, logprobs, pending()))
    both = pending(score(asked[3].row), score(asked[0].row))
    asked[0] = asked[0]._replace(score=both._replace(place=1))
    asked[2] = asked[2]._replace(score=pending(error=RuntimeError("gone")))
    asked[3] = asked[3]._replace(score=both)
    return [Flight(Step(4, 1, ((3, 1), (2,))), asked[:3]), Flight(Step(5, 1, ((0,),)), asked[3:])]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Scores):
        pairs = one.arrays(), other.arrays()
        return pairs[0].keys() == pairs[1].keys() and all(np.array_equal(a, pairs[1][n]) for n, a in pairs[0].items())
    return bool(np.array_equal(one, other)) if isinstance(one, np.ndarray) else bool(one == other)


@pytest.mark.parametrize("extra", [False, True], ids=["plain", "with candidates and log-probabilities"])
def test_what_is_read_is_what_was_written_and_the_rest_is_asked_for(tmp_path: Path, extra: bool) -> None:
    wrote, asked_for = flights(extra), list[tuple[str, bool]]()

    def ask(rows: Sequence[Row], candidates: Sequence[Any]) -> list[Pending]:
        asked_for.extend((r.name, c is not None) for r, c in zip(rows, candidates, strict=True))
        return [pending(score(r, seed=1)) for r in rows]

    in_flight.save(tmp_path / "file", wrote, "about")
    found = in_flight.load(tmp_path / "file", "about", ask)
    assert found is not None
    assert [f.step for f in found] == [f.step for f in wrote]
    assert asked_for == [("row 1", extra), ("row 2", extra)]
    pairs = zip([a for f in found for a in f.asked], [a for f in wrote for a in f.asked], strict=True)
    for i, (now, before) in enumerate(pairs):
        assert same(now.row.ids, before.row.ids)
        assert now.row[1:] == before.row[1:]
        assert same(now.candidates, before.candidates)
        assert same(now.logprobs, before.logprobs)
        assert same(now.score.result(), score(now.row, seed=1 if i in (1, 2) else 0))


def test_what_depended_on_something_else_is_not_read(tmp_path: Path) -> None:
    in_flight.save(tmp_path / "file", flights(extra=False), "about")
    assert in_flight.load(tmp_path / "file", "another teacher", lambda rows, candidates: []) is None


def test_hidden_states_are_asked_for_again(tmp_path: Path) -> None:
    (flight, *_) = flights(extra=False)
    row = flight.asked[0].row
    large = Scores(hidden_states=np.zeros((len(row.ids) - row.start, 8), np.uint16))
    wrote = [Flight(Step(0, 0, ((0,),)), [flight.asked[0]._replace(score=pending(large))])]
    in_flight.save(tmp_path / "file", wrote, "about")
    found = in_flight.load(tmp_path / "file", "about", lambda rows, candidates: [pending(large) for _ in rows])
    assert found is not None
    assert found[0].asked[0].score.result() is large
