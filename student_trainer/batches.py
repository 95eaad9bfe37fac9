"""Which sequences train together, and a micro-batch of them as arrays.

The global batch of a step is drawn uniformly; inside it, sequences are sorted by length into its micro-batches, so
that little is padded and no step sees only long or only short ones. Knows numpy and torch's Sampler, no model,
teacher or loss. Legend: B rows, L columns, P prompt tokens, R completion tokens, N completion tokens of a
micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from protos.scores import Ids, Mode
from protos.scores import Sequence as Tokens

Longs = npt.NDArray[np.int64]


class Row(NamedTuple):
    """One sequence to learn from: int32[P+R], P, a name for messages, and what chooses its teacher."""

    ids: Ids
    start: int
    name: str = ""
    mode: Mode | None = None
    domain: str | None = None

    def tokens(self, candidate_ids: Ids | None = None) -> Tokens:
        """As the teacher scores it: from position P on."""
        return Tokens(self.ids, self.start, candidate_ids)


@dataclass(frozen=True, eq=False)
class Padded:
    """A micro-batch.

    `input_ids` int64[B,L], padded on the right, where causal attention never looks, so it needs no mask. `places`
    int64[N] are the flat positions (row * L + column) whose logits predict the completion tokens: columns P-1..P+R-2
    of each row in turn. `targets` int64[N] are those tokens, P..P+R-1.
    """

    input_ids: Longs
    places: Longs
    targets: Longs


def pad(rows: Sequence[Row], pad_id: int) -> Padded:
    """The micro-batch of `rows`, in their order."""
    lengths = np.fromiter((len(r.ids) for r in rows), np.int64, len(rows))
    starts = np.fromiter((r.start for r in rows), np.int64, len(rows))
    columns = np.arange(lengths.max())
    ids = np.full((len(rows), len(columns)), pad_id, np.int64)
    ids[columns < lengths[:, None]] = np.concatenate([r.ids for r in rows])
    predicting = (columns >= starts[:, None] - 1) & (columns < lengths[:, None] - 1)
    places = np.flatnonzero(predicting)
    return Padded(ids, places, ids.reshape(-1)[places + 1])


@dataclass(frozen=True, eq=False)
class Packed:
    """A micro-batch as one row of L tokens, in which one sequence stands after the other.

    `input_ids` int64[L], `positions` int64[L] of each token in its own sequence, `lengths` of the sequences; `places`
    and `targets` as in Padded, with places in 0..L-1.
    """

    input_ids: Longs
    positions: Longs
    places: Longs
    targets: Longs
    lengths: tuple[int, ...]


def pack(rows: Sequence[Row]) -> Packed:
    """The micro-batch of `rows`, in their order, without padding."""
    lengths = np.fromiter((len(r.ids) for r in rows), np.int64, len(rows))
    starts = np.fromiter((r.start for r in rows), np.int64, len(rows))
    ids = np.concatenate([r.ids for r in rows]).astype(np.int64)
    positions = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    predicting = (positions >= np.repeat(starts, lengths) - 1) & (positions < np.repeat(lengths, lengths) - 1)
    places = np.flatnonzero(predicting)
    return Packed(ids, positions, places, ids[places + 1], tuple(lengths.tolist()))


def completion_ids(rows: Sequence[Row]) -> Longs:
    """int64[N]: the completion tokens of `rows`, one row after the other."""
    return np.concatenate([r.ids[r.start :] for r in rows]).astype(np.int64)


def first_tokens(rows: Sequence[Row]) -> npt.NDArray[np.bool_]:
    """bool[N]: which completion tokens of `rows` are the first of theirs."""
    lengths = np.fromiter((len(r.ids) - r.start for r in rows), np.int64, len(rows))
    first = np.zeros(lengths.sum(), np.bool_)
    first[(np.cumsum(lengths) - lengths)[lengths > 0]] = True
    return first


def completion_tokens(rows: Sequence[Row]) -> int:
    """N, the completion tokens of `rows`."""
    return sum(len(r.ids) - r.start for r in rows)


def cut(lengths: Sequence[int], parts: int, *, packed: bool) -> list[list[int]]:
    """0..rows-1, longest first, in `parts` groups of neighbours, none empty.

    Packed, groups have about equally many tokens. Padded, few positions are padding, and no group is larger than equal
    numbers of rows would make the first one: memory is no more than without this. Rows of one length are cut into
    groups whose sizes differ by at most one.
    """
    order = np.argsort(-np.asarray(lengths, np.int64), kind="stable")
    rows = len(order)
    if not 1 <= parts <= rows:
        raise ValueError(f"{rows} rows cannot be cut into {parts} groups")
    sizes = np.asarray(lengths, np.int64)[order].astype(np.float64)
    first, end = np.arange(rows)[:, None], np.arange(1, rows + 1)
    sums = np.concatenate([[0.0], np.cumsum(sizes)])
    held = sums[end] - sums[first] if packed else (end - first) * sizes[first]
    most = -(-rows // parts) * sizes[0]
    # Squares, which spread what is held evenly, and where padding counts, before them the sum of what is held.
    cost = np.where((end > first) & (held <= most), (held / most) ** 2 + (0 if packed else rows * held / most), np.inf)
    best, cuts = np.concatenate([[0.0], np.full(rows, np.inf)]), []
    for _ in range(parts):
        through = best[:-1, None] + cost
        cuts.append(through.argmin(0))
        best = np.concatenate([[np.inf], through.min(0)])
    groups, stop = [], rows
    for starts in reversed(cuts):
        start = int(starts[stop - 1])
        groups.append(order[start:stop].tolist())
        stop = start
    return groups[::-1]


class GroupedSampler(Sampler[int]):
    """The order of an epoch: a permutation, cut into global batches, each sorted by length, longest first.

    The order depends on seed and epoch alone, so that a run that goes on finds the same one. `lengths` int64[rows];
    `group` is the number of rows of a global batch, all processes and accumulation steps together.
    """

    def __init__(self, lengths: npt.ArrayLike, group: int, seed: int) -> None:
        self.lengths = np.asarray(lengths, np.int64)
        self.group, self.seed, self.epoch = group, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(len(self.lengths))
        for first in range(0, len(order), self.group):
            batch = order[first : first + self.group]
            yield from batch[np.argsort(-self.lengths[batch], kind="stable")].tolist()
