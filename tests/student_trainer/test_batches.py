"""Micro-batches: alignment, grouping, order."""

from __future__ import annotations

import numpy as np
import pytest

from student_trainer.batches import GroupedSampler, Row, completion_tokens, cut, pad


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


@pytest.mark.parametrize("packed", [True, False])
def test_groups_hold_every_row_once_with_the_longest_first(packed: bool) -> None:
    lengths = np.random.default_rng(2).integers(1, 400, 37).tolist()
    for parts in (1, 5, 36, 37):
        groups = cut(lengths, parts, packed=packed)
        assert len(groups) == parts
        assert all(groups)
        assert [lengths[i] for group in groups for i in group] == sorted(lengths, reverse=True)
    with pytest.raises(ValueError, match="37 rows cannot be cut into 38 groups"):
        cut(lengths, 38, packed=packed)


@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_one_length_are_cut_into_equal_groups(packed: bool) -> None:
    sizes = [len(group) for group in cut([7] * 22, 4, packed=packed)]
    assert sorted(sizes) == [5, 5, 6, 6]


def test_unequal_rows_are_cut_by_tokens_with_less_padding_and_no_more_memory() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = np.sort(np.exp(rng.uniform(4, 10, 32)).astype(np.int64))[::-1]
        equal = [lengths[i : i + 4] for i in range(0, 32, 4)]
        held = [4 * part[0] for part in equal]
        padded = [len(g) * lengths[g[0]] for g in cut(lengths.tolist(), 8, packed=False)]
        assert max(padded) <= max(held)
        assert sum(padded) - lengths.sum() < 0.6 * (sum(held) - lengths.sum())
        packed = [lengths[g].sum() for g in cut(lengths.tolist(), 8, packed=True)]
        assert max(packed) <= max(part.sum() for part in equal)
        assert max(packed) < lengths.sum() / 8 + lengths[0]


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
