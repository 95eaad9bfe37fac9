"""Micro-batches: alignment, grouping, order."""

from __future__ import annotations

import numpy as np

from student_trainer.batches import GroupedSampler, Row, completion_tokens, pad, split_by_length


def some_rows(n: int = 9, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        length = int(rng.integers(3, 12))
        rows.append(Row(rng.integers(1, 50, length).astype(np.int32), int(rng.integers(1, length)), str(i)))
    return rows


def test_a_place_is_the_position_before_its_completion_token() -> None:
    rows = some_rows()
    padded = pad(rows, 0)
    width = padded.input_ids.shape[1]
    expected = [
        (i * width + column - 1, int(row.ids[column]))
        for i, row in enumerate(rows)
        for column in range(row.start, len(row.ids))
    ]
    assert list(zip(padded.places.tolist(), padded.targets.tolist(), strict=True)) == expected
    assert completion_tokens(rows) == len(expected)


def test_rows_are_padded_on_the_right_and_kept_whole() -> None:
    rows = some_rows()
    padded = pad(rows, 0)
    for i, row in enumerate(rows):
        assert padded.input_ids[i, : len(row.ids)].tolist() == row.ids.tolist()
        assert not padded.input_ids[i, len(row.ids) :].any()


def test_a_prompt_of_one_token_is_predicted_from_its_only_position() -> None:
    padded = pad([Row(np.array([7, 8, 9], np.int32), 1)], 0)
    assert padded.places.tolist() == [0, 1]
    assert padded.targets.tolist() == [8, 9]


def test_parts_hold_every_row_once_with_the_longest_first() -> None:
    lengths = [5, 1, 9, 3, 7, 2, 8]
    parts = split_by_length(lengths, 3)
    assert [lengths[i] for part in parts for i in part] == sorted(lengths, reverse=True)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_an_epoch_is_a_permutation_sorted_inside_each_global_batch() -> None:
    lengths = np.random.default_rng(1).integers(1, 99, 50)
    sampler = GroupedSampler(lengths, 8, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(50))
    for first in range(0, 50, 8):
        group = lengths[order[first : first + 8]]
        assert (np.diff(group) <= 0).all()


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = list(range(40))
    first, again, other = (GroupedSampler(lengths, 8, seed) for seed in (3, 3, 4))
    assert list(first) == list(again)
    assert list(first) != list(other)
    again.set_epoch(1)
    assert list(first) != list(again)
    first.set_epoch(1)
    assert list(first) == list(again)
