"""Batches under a token budget with little padding."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from teacher_server.backends.packing import FREE_PADDING, MAX_WASTE, chunks, pack, waste

LENGTHS = st.lists(st.integers(2, 5000), max_size=200)


@given(LENGTHS, st.integers(1, 20000), st.integers(1, 64), st.booleans(), st.booleans(), st.integers(0, 3000))
def test_every_sequence_is_in_one_batch_within_the_budget(
    lengths: list[int], budget: int, most: int, padded: bool, equal: bool, boundary: int
) -> None:
    batches = pack(lengths, budget, padded=padded, equal=equal, boundary=boundary, most=most)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        sizes = [lengths[i] for i in batch]
        area = len(sizes) * max(sizes) if padded else sum(sizes)
        assert len(batch) == 1 or area <= budget
        assert len(batch) <= most
        assert len({size > boundary for size in sizes}) == 1
        if padded:
            assert area - sum(sizes) <= max(FREE_PADDING, MAX_WASTE * area)
        if padded and equal:
            assert len(set(sizes)) == 1


def test_padding_of_a_realistic_burst_is_below_the_bound() -> None:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(6, 0.8, 512), 2, 4096).astype(int).tolist()
    batches = pack(lengths, 16384)
    assert waste(lengths, batches) < 0.09
    assert len(batches) < 1.5 * sum(lengths) / 16384 + 8


def test_a_burst_of_short_sequences_of_all_lengths_stays_within_the_bound() -> None:
    lengths = np.random.default_rng(0).integers(2, 301, 512).tolist()
    batches = pack(lengths, 16384)
    assert waste(lengths, batches) <= MAX_WASTE
    assert len(batches) < 25


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=30), st.integers(1, 40))
def test_chunks_hold_every_row_once_in_order_and_are_full_but_for_the_last(
    bounds: list[tuple[int, int]], most: int
) -> None:
    ranges = [(owner, *pair) for owner, pair in enumerate(bounds)]
    got = list(chunks(ranges, most))
    rows = [(owner, row) for chunk in got for owner, first, last in chunk for row in range(first, last)]
    assert rows == [(owner, row) for owner, first, last in ranges for row in range(first, last)]
    sizes = [sum(last - first for _, first, last in chunk) for chunk in got]
    assert all(size == most for size in sizes[:-1])
    assert all(0 < size <= most for size in sizes)


def test_rows_of_an_owner_that_is_dropped_meanwhile_are_left_out_of_later_chunks() -> None:
    dropped: set[str] = set()
    made = chunks([("a", 0, 5), ("b", 3, 5)], 2, lambda owner: owner in dropped)
    assert next(made) == [("a", 0, 2)]
    dropped.add("a")
    assert list(made) == [[("b", 3, 5)]]
