"""The read-out of logits in blocks and shards against its formulas in float64."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from protos.scores import TAIL_FLOOR, Field, ScoreSpec
from teacher_server.backends.readout import Rows, read_chunk
from teacher_server.backends.readout_blocks import TORCH, Kernels, Plan, TorchKernels, block_size, merge, read_shard
from teacher_server.backends.readout_check import choose, disagreement, reference

TEMPERATURES = [(1.0,), (2.0,), (1.0, 0.1), (0.1, 0.5, 0.7, 1.0, 1.5, 2.0, 5.0, 10.0)]


def logits_of(vocab: int, seed: int = 0) -> Tensor:
    """float32[8, V], a view of wider rows whose padding is loud: flat, usual, sharp and very sharp rows, ties, -inf."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.full((8, -(-vocab // 64) * 64 + 64), 1e4)
    spread = torch.tensor([0, 1e-3, 1, 4, 10, 40, 3, 3])[:, None]
    wide[:, :vocab] = torch.randn(8, vocab, generator=generator) * spread
    wide[3, :vocab] += 50
    wide[6, :vocab] = wide[6, :vocab].round()
    wide[7, 1:vocab:3] = -math.inf
    return wide[:, :vocab]


def rows_of(vocab: int, candidates: int, seed: int = 0) -> Rows:
    """Tokens and candidates whose logits are finite in every row of `logits_of`."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(-(-vocab // 3), (8, candidates + 1), generator=generator) * 3
    return Rows(ids[:, 0], ids[:, 1:] if candidates else None)


def check(got: dict[str, Tensor], logits: Tensor, rows: Rows, spec: ScoreSpec) -> None:
    """Every field against float64: log-probabilities within 1e-5, tails within 1e-4 of their size."""
    logits = logits.double()
    want = reference(
        logits.clone(), rows, spec, spec.fields(0 if rows.candidates is None else rows.candidates.shape[1])
    )
    assert got.keys() == want.keys()
    for name, expected in want.items():
        values = got[name].double()
        assert values.shape == expected.shape
        if name == "top_token_ids":
            ids = got[name].long()
            assert all(len(set(row)) == spec.top_k for row in ids.tolist())
            torch.testing.assert_close(logits.gather(1, ids), logits.gather(1, expected), rtol=0, atol=0)
        elif name == "tail_logprob":
            torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(values, expected.double(), rtol=2e-7, atol=1e-5)


@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize(("vocab", "top_k"), [(3000, 0), (3000, 1), (3000, 64), (5001, 300), (20001, 64), (300, 8)])
def test_every_field_agrees_with_float64(vocab: int, top_k: int, temperatures: tuple[float, ...]) -> None:
    logits, spec = logits_of(vocab), ScoreSpec(top_k, temperatures)
    for candidates in (0, 5):
        rows = rows_of(vocab, candidates)
        check(read_chunk(logits_of(vocab), rows, spec, spec.fields(candidates)), logits, rows, spec)


@pytest.mark.parametrize("vocab", [1, 7, 261])
def test_a_top_k_of_the_whole_vocabulary_has_an_empty_tail(vocab: int) -> None:
    logits, rows, spec = logits_of(vocab)[:7], rows_of(vocab, 0), ScoreSpec(vocab, (1.0, 3.0))
    rows = Rows(rows.targets[:7], None)
    got = read_chunk(logits.clone(), rows, spec, spec.fields(0))
    check(got, logits, rows, spec)
    assert (got["tail_logprob"] == TAIL_FLOOR).all()
    assert (got["log_normalizer"][:, 0] == 0).all()


def test_rows_of_equal_logits_name_distinct_ids_of_the_real_vocabulary() -> None:
    logits, rows, spec = torch.full((8, 4097), 3.0), rows_of(4097, 0), ScoreSpec(64)
    check(read_chunk(logits.clone(), rows, spec, spec.fields(0)), logits, rows, spec)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_is_told_and_harms_no_other(bad: float) -> None:
    logits, rows, spec = logits_of(3000), rows_of(3000, 0), ScoreSpec(16, (1.0, 2.0))
    broken = logits.clone()
    broken[2, 77] = bad
    want, got = (read_chunk(x.clone(), rows, spec, spec.fields(0)) for x in (logits, broken))
    assert got["finite"].tolist() == [True, True, False, True, True, True, True, True]
    assert all(torch.equal(got[name][3:], want[name][3:]) for name in want)


def test_a_row_without_any_finite_logit_is_told() -> None:
    logits, spec = torch.full((8, 3000), -math.inf), ScoreSpec(16)
    assert not read_chunk(logits, rows_of(3000, 0), spec, spec.fields(0))["finite"].any()


def test_half_precision_logits_are_read_in_float32() -> None:
    logits, rows, spec = logits_of(3000).bfloat16(), rows_of(3000, 5), ScoreSpec(64, (1.0, 2.0))
    check(read_chunk(logits.clone(), rows, spec, spec.fields(5)), logits, rows, spec)


@pytest.mark.parametrize(
    "want", [{Field.TOP}, {Field.TAIL_LOGPROB}, {Field.LOG_NORMALIZER}, {Field.CANDIDATE_LOGPROBS}]
)
def test_a_field_alone_equals_the_same_field_among_all(want: set[Field]) -> None:
    logits, rows, spec = logits_of(3000), rows_of(3000, 5), ScoreSpec(64, (2.0, 1.0))
    everything = read_chunk(logits.clone(), rows, spec, spec.fields(5))
    for name, values in read_chunk(logits.clone(), rows, spec, frozenset(want)).items():
        torch.testing.assert_close(values, everything[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("splits", [[3000], [1500], [1024, 2048], [1000, 1010, 2990], [2, 2999, 3000]])
@pytest.mark.parametrize(
    ("top_k", "temperatures"), [(0, (1.0,)), (1, (1.0, 2.0)), (64, (1.0, 0.1, 10.0)), (500, (2.0,))]
)
def test_shards_of_the_vocabulary_merge_into_the_whole(
    splits: list[int], top_k: int, temperatures: tuple[float, ...]
) -> None:
    vocab, candidates = 3000, 5
    logits, rows, spec = logits_of(vocab), rows_of(vocab, candidates), ScoreSpec(top_k, temperatures)
    fields = spec.fields(candidates)
    plan = Plan.of(spec, fields, candidates)
    packed = [
        read_shard(logits[:, first:last].clone(), rows, plan, TORCH, offset=first)
        for first, last in pairwise([0, *splits, vocab])
    ]
    assert all(part.shape == (8, sum(plan.widths)) and part.dtype == torch.float32 for part in packed)
    check(merge(torch.stack(packed), spec, fields, candidates), logits, rows, spec)


def test_a_row_is_not_finite_if_one_shard_says_so() -> None:
    logits, rows, spec = logits_of(3000), rows_of(3000, 0), ScoreSpec(8)
    logits[4, 2500] = math.nan
    plan = Plan.of(spec, spec.fields(0), 0)
    packed = [read_shard(logits[:, a:b].clone(), rows, plan, TORCH, offset=a) for a, b in ((0, 1500), (1500, 3000))]
    finite = merge(torch.stack(packed), spec, spec.fields(0))["finite"]
    assert finite.tolist() == [row != 4 for row in range(8)]


@pytest.mark.parametrize(("top_k", "size"), [(0, 256), (1, 256), (64, 64), (256, 32), (1024, 16)])
def test_blocks_of_qwen3s_vocabulary_balance_maxima_and_chosen_logits(top_k: int, size: int) -> None:
    assert block_size(151_669, top_k) == size
    assert 2 * top_k * size <= 151_669


class _HalfSums(TorchKernels):
    """Loses the first half of each row's mass, as a wrong mask would."""

    def summarize(self, logits_RV: Tensor, size: int, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        maxima, sums = super().summarize(logits_RV, size, temperatures)
        sums[:, :, : sums.shape[2] // 2] = -math.inf
        return maxima, sums


class _WrongBlocks(TorchKernels):
    """Reads the neighbour of each block."""

    def take(self, logits_RV: Tensor, blocks_RK: Tensor, size: int) -> Tensor:
        return super().take(logits_RV, (blocks_RK - 1).clamp(min=0), size)


@pytest.mark.parametrize(("kernels", "name"), [(_HalfSums(), "token_logprobs"), (_WrongBlocks(), "top_logprobs")])
def test_kernels_that_are_wrong_are_found_out(kernels: Kernels, name: str) -> None:
    assert disagreement(kernels, torch.device("cpu"), 3000).startswith(f"{name} differs by")


@pytest.mark.parametrize("vocab", [1, 7, 261, 3001])
def test_pytorchs_kernels_pass_the_check_and_are_those_of_a_cpu(vocab: int) -> None:
    assert disagreement(TORCH, torch.device("cpu"), vocab) == ""
    assert choose(torch.device("cpu"), vocab) is TORCH
