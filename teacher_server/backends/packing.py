"""Which waiting sequences share a batch, and which of their rows a chunk. Knows lengths, no engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Many
from typing import TypeVar

T = TypeVar("T")

MAX_WASTE = 0.12
"""Largest share of padding in one padded batch, but for FREE_PADDING."""
FREE_PADDING = 256
"""Padded tokens of a batch that cost less than another forward pass would."""


def pack(
    lengths: Many[int], budget: int, *, padded: bool = True, equal: bool = False, boundary: int = 0, most: int = 1024
) -> list[list[int]]:
    """Batches of indices into `lengths`, longest first within each and overall.

    A batch of right-padded rows takes at most `budget` tokens, padding included, and `most` rows; one sequence alone
    may exceed the budget. Padding stays within MAX_WASTE of the batch or FREE_PADDING tokens. `padded` False is for
    engines that concatenate rows without padding; `equal` True is for models that bear none. Lengths at or below
    `boundary` never share a batch with longer ones, for models whose positions depend on the longest row.
    """
    batches: list[list[int]] = []
    longest = tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if batches:
            rows = len(batches[-1]) + 1
            area = rows * longest if padded else tokens + length
            padding = area - tokens - length
            fits = (
                not (equal and padding)
                and area <= budget
                and rows <= most
                and padding <= max(FREE_PADDING, int(MAX_WASTE * area))
            )
            if fits and (longest > boundary) == (length > boundary):
                batches[-1].append(index)
                tokens += length
                continue
        batches.append([index])
        longest = tokens = length
    return batches


def waste(lengths: Many[int], batches: list[list[int]]) -> float:
    """The share of padding in all padded tokens of `batches`."""
    area = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / area if area else 0.0


def chunks(
    ranges: Iterable[tuple[T, int, int]], most: int, dropped: Callable[[T], bool] = lambda _: False
) -> Iterator[list[tuple[T, int, int]]]:
    """The rows first..last-1 of each owner, in order, as chunks of exactly `most` rows but for the last.

    A chunk is a list of ranges, too; a range that does not fit goes on in the next chunk. `dropped` is asked when an
    owner's rows are reached, once a chunk, and leaves out the rest of them.
    """
    chunk: list[tuple[T, int, int]] = []
    room = most
    for owner, first, end in ranges:
        while first < end and not dropped(owner):
            last = min(end, first + room)
            chunk.append((owner, first, last))
            room -= last - first
            first = last
            if room == 0:
                yield chunk
                chunk, room = [], most
    if chunk:
        yield chunk
