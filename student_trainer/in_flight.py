"""Rollouts that the teacher was asked about and that have not trained yet: as a file of a checkpoint, and back.

The file holds ids, the sampler's log-probabilities, the ids that the teacher was asked about, and those scores that
have arrived; whoever reads it asks for the others again. Hidden states are not held: they would fill the disk. Knows
no model and no loss. Legend: B rollouts, R completion tokens of one, K candidates.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from protos.scores import Floats, Ids, Mode, Scores

from .batches import Row
from .schedule import Step
from .teachers import Pending


class Asked(NamedTuple):
    """A rollout that its teacher is scoring: `candidates` int32[R,K] are the ids that the teacher was asked about,
    `logprobs` float32[R] the sampler's.
    """

    row: Row
    candidates: Ids | None
    logprobs: Floats | None
    score: Pending


class Flight(NamedTuple):
    """The rollouts of a step, in the order in which they were asked about."""

    step: Step
    asked: list[Asked]


Ask = Callable[[Sequence[Row], Sequence[Ids | None]], Sequence[Pending]]
"""Asks for the scores of rows, with candidates where there are some."""


def save(path: Path, flights: Sequence[Flight], about: str) -> None:
    """Writes `flights`, whose steps may have no rollout; `about` says what they depend on (see `load`)."""
    asked = [a for flight in flights for a in flight.asked]
    scores = [_arrived(a.score) for a in asked]
    tensors: dict[str, Any] = {
        "ids": np.concatenate([np.zeros(0, np.int32), *(a.row.ids for a in asked)]),
        "lengths": np.array([len(a.row.ids) for a in asked], np.int64),
        "starts": np.array([a.row.start for a in asked], np.int64),
        "scored": np.array([s is not None for s in scores], np.uint8),
    }
    columns: dict[str, list[Any]] = {"candidates": [], "logprobs": []}
    for a in asked:
        columns["candidates"] += [] if a.candidates is None else [a.candidates]
        columns["logprobs"] += [] if a.logprobs is None else [a.logprobs]
    for s in scores:
        for name, array in ({} if s is None else s.arrays()).items():
            columns.setdefault(_FIELD + name, []).append(array)
    tensors |= {name: np.concatenate(parts) for name, parts in columns.items() if parts}
    rows = [(a.row.name, a.row.mode and a.row.mode.value, a.row.domain) for a in asked]
    steps = [(*flight.step, len(flight.asked)) for flight in flights]
    save_file(tensors, path, {"about": about, "rows": json.dumps(rows), "steps": json.dumps(steps)})


def load(path: Path, about: str, ask: Ask) -> list[Flight] | None:
    """What `save` wrote, with the scores that it does not hold asked for; None where it depended on something else."""
    with safe_open(path, "numpy") as file:
        described = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    if described["about"] != about:
        return None
    lengths, starts = tensors["lengths"], tensors["starts"]
    ids = _parts(tensors["ids"], lengths)
    rows = [
        Row(i, int(start), name, Mode(mode) if mode else None, domain)
        for i, start, (name, mode, domain) in zip(ids, starts, json.loads(described["rows"]), strict=True)
    ]
    nothing: list[Any] = [None] * len(rows)
    found = {n: _parts(tensors[n], lengths - starts) if n in tensors else nothing for n in ("candidates", "logprobs")}
    scored = tensors["scored"].astype(bool)
    fields = {n.removeprefix(_FIELD): _parts(tensors[n], (lengths - starts)[scored]) for n in tensors if _FIELD in n}
    known = iter([Scores(**dict(zip(fields, parts, strict=True))) for parts in zip(*fields.values(), strict=True)])
    missing = np.flatnonzero(~scored)
    asked = iter(ask([rows[i] for i in missing], [found["candidates"][i] for i in missing]) if len(missing) else ())
    pending = [_done(next(known)) if is_scored else next(asked) for is_scored in scored]
    rollouts = map(Asked, rows, found["candidates"], found["logprobs"], pending)
    return [
        Flight(Step(number, epoch, tuple(tuple(m) for m in micro_batches)), list(islice(rollouts, size)))
        for number, epoch, micro_batches, size in json.loads(described["steps"])
    ]


_FIELD = "score."


def _arrived(pending: Pending) -> Scores | None:
    future = pending.future
    if not future.done() or future.cancelled() or future.exception() is not None:
        return None
    scores = pending.result()
    return None if scores.hidden_states is not None else scores


def _done(scores: Scores) -> Pending:
    future: Future[list[Scores]] = Future()
    future.set_result([scores])
    return Pending(future, 0)


def _parts(joined: Any, lengths: Any) -> list[Any]:
    return np.split(joined, np.cumsum(lengths)[:-1]) if len(lengths) else []
