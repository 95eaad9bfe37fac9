"""Scores from the top-k log-probabilities that a stock server gives, at temperature 1.

Such a server tells neither the log-normaliser of another temperature nor the mass outside the top K; the first is 0 at
temperature 1 and the second is 1 - sum of the top's probabilities, in float64. Pure functions of arrays. Legend: T
scored positions, K alternatives.

How exact that tail is: servers softmax in float32 and give float32. Each log-probability is off by its own rounding,
|l| 2^-24, and all of a position by one error of the log-sum-exp, which loses some of the small addends. Over 151,936
logits, from flat to certain, float32 on a CPU leaves 1 - sum within TAIL_RESOLUTION plus a thousandth of the tail
(tests/student_trainer/test_stock_shapes.py). What comes out smaller than TAIL_RESOLUTION, or negative, is rounding and
counts as TAIL_RESOLUTION, -12.5 nats: it moves a forward KL by less than 1e-4 nats, and a reverse KL takes the
student's own mass in the tail for less wrong than an exact tail of the teacher would.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from protos import errors
from protos.scores import TAIL_FLOOR, Field, Floats, Ids, Scores, ScoreSpec

GIVEN = frozenset({Field.TOKEN_LOGPROBS, Field.TOP, Field.LOG_NORMALIZER, Field.TAIL_LOGPROB})
"""The fields that can be made of a stock server's answers."""
TAIL_RESOLUTION = 2.0**-18
"""Mass, about 3.8e-6, below which a tail is not known; a smaller one counts as this."""
EXCESS = 1e-3
"""How far above 1 the probabilities of a top K may sum up; beyond it they are no log-probabilities at temperature 1."""
CLAMPED = -9999.0
"""What vLLM writes for a log-probability of minus infinity."""


def check_spec(spec: ScoreSpec, address: str) -> None:
    """Unsupported for what no stock server gives."""
    others = [t for t in spec.temperatures if t != 1]
    tempered = not spec.want or spec.want & {Field.LOG_NORMALIZER, Field.TAIL_LOGPROB}
    if others and tempered:
        named = ", ".join(f"{t:g}" for t in others)
        raise errors.Unsupported(
            f"{address} gives a top {spec.top_k} at temperature 1, of which neither log-normaliser nor tail at "
            f"temperature {named} can be made; ask at temperature 1 alone, or use a strong2weak teacher"
        )
    missing = spec.want - GIVEN
    if missing:
        names = ", ".join(sorted(field.value for field in missing))
        raise errors.Unsupported(f"{address} cannot give {names}: it is no strong2weak teacher")


def tail_logprob(top_logprobs: Floats, normalized_size: int) -> Floats:
    """float32[T] log of the mass outside float32[T,K] `top_logprobs`; at least log(TAIL_RESOLUTION), or the empty
    tail's -100 where the top is everything.
    """
    rows, k = top_logprobs.shape
    if k >= normalized_size:
        return np.full(rows, TAIL_FLOOR, np.float32)
    left = 1.0 - np.exp(top_logprobs.astype(np.float64)).sum(1)
    tail: Floats = np.log(np.maximum(left, TAIL_RESOLUTION)).astype(np.float32)
    return tail


def make_scores(
    token_logprobs: Floats, top_ids: Ids, top_logprobs: Floats, spec: ScoreSpec, normalized_size: int
) -> Scores:
    """The wanted fields of float32[T], int32[T,K] and float32[T,K], K = `spec.top_k`; TeacherFailed for numbers that
    are no log-probabilities.
    """
    _check_numbers(token_logprobs, top_logprobs)
    wanted = spec.fields(0)
    shape = len(token_logprobs), len(spec.temperatures)
    tail = tail_logprob(top_logprobs, normalized_size) if Field.TAIL_LOGPROB in wanted else None
    return Scores(
        token_logprobs=token_logprobs if Field.TOKEN_LOGPROBS in wanted else None,
        top_token_ids=top_ids if Field.TOP in wanted else None,
        top_logprobs=top_logprobs if Field.TOP in wanted else None,
        log_normalizer=np.zeros(shape, np.float32) if Field.LOG_NORMALIZER in wanted else None,
        tail_logprob=None if tail is None else np.repeat(tail[:, None], shape[1], axis=1),
    )


def _check_numbers(token_logprobs: Floats, top_logprobs: Floats) -> None:
    for name, array in (("token", token_logprobs), ("top", top_logprobs)):
        if not np.isfinite(array).all() or (array <= CLAMPED).any():
            raise errors.TeacherFailed(f"the server gave a {name} log-probability that is not finite")
        if (array > EXCESS).any():
            raise errors.TeacherFailed(
                f"the server gave a {name} log-probability of {array.max():.4g}, above 0: these are no "
                "log-probabilities; start vLLM with --logprobs-mode raw_logprobs, its default"
            )
    sums = np.exp(top_logprobs.astype(np.float64)).sum(1)
    if len(sums) and sums.max() > 1 + EXCESS:
        raise errors.TeacherFailed(
            f"the server's top {top_logprobs.shape[1]} have probabilities that sum up to {sums.max():.6g}: these are "
            "no log-probabilities at temperature 1; start vLLM with --logprobs-mode raw_logprobs, its default"
        )


def table(rows: Sequence[Mapping[str, Mapping[str, float]]], tokens: Ids, top_k: int) -> tuple[Floats, Ids, Floats]:
    """float32[T], int32[T,K], float32[T,K] of T positions in vLLM's shape: alternatives by id, in one mapping each.

    `tokens` int32[T] are those that stand there: each is among its row's K, or the one more of K + 1. TeacherFailed
    for rows of another size or without their token. The JSON is objects by now; from here on it is arrays.
    """
    counts = np.fromiter((len(row) for row in rows), np.int64, len(rows))
    wrong = (counts != max(top_k, 1)) & (counts != top_k + 1)
    if wrong.any():
        raise errors.TeacherFailed(
            f"the server gave {counts[wrong][0]} alternatives where {top_k} were asked for; is it a vLLM server?"
        )
    total = int(counts.sum())
    flat_ids = np.fromiter((int(key) for row in rows for key in row), np.int64, total)
    flat = np.fromiter((entry["logprob"] for row in rows for entry in row.values()), np.float64, total)
    place = np.arange(top_k + 1) < counts[:, None]
    ids = np.full(place.shape, -1, np.int64)
    logprobs = np.full(place.shape, -np.inf)
    ids[place], logprobs[place] = flat_ids, flat
    own = ids == tokens[:, None]
    if not (own.sum(1) == 1).all():
        raise errors.TeacherFailed("the server left out the log-probability of a token that stands there")
    token_logprobs = logprobs[own].astype(np.float32)
    logprobs[own & (counts == top_k + 1)[:, None]] = -np.inf  # it is beside the top, not in it
    order = np.argsort(-logprobs, axis=1, kind="stable")[:, :top_k]
    top: npt.NDArray[np.float64] = np.take_along_axis(logprobs, order, axis=1)
    return token_logprobs, np.take_along_axis(ids, order, axis=1).astype(np.int32), top.astype(np.float32)
