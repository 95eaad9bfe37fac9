"""Scores of rows of logits from one pass over them: the vocabulary in blocks, and shards of it merged.

A block is `size` neighbouring columns; of each, one pass keeps the maximum and, for each temperature, the sum of
exponentials. The K largest logits of a row lie within its K blocks of largest maximum: each of these holds at least one
logit that is no smaller than any outside them. All later steps read those blocks alone. Normalisers are the logsumexp
of the blocks' sums, a tail that of the other blocks' sums and of what was not selected inside: never 1 - sum.

A shard is a part of the vocabulary's columns, as tensor parallelism splits it; the whole is a single shard. What each
gives is one tensor, so that a group needs one all_gather. Knows no LM head and no queue. Legend: S shards, R rows,
V columns of the shard, B blocks, K alternatives, C candidates, N temperatures read (the first is 1), M asked for, W
numbers of a packed row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from protos.scores import TAIL_FLOOR, Field, ScoreSpec


@dataclass(frozen=True, eq=False)
class Rows:
    """What is asked about R rows: `targets` int64[R] and `candidates` int64[R, C] or None, on any device."""

    targets: Tensor
    candidates: Tensor | None


class Kernels(Protocol):
    """The two steps that touch the logits [R, V] of any float dtype, whose rows are contiguous and may lie apart."""

    def summarize(self, logits_RV: Tensor, size: int, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Of each block: the maximum float32[R, B], and log sum exp((l - maximum) / T) float32[R, N, B]."""

    def take(self, logits_RV: Tensor, blocks_RK: Tensor, size: int) -> Tensor:
        """The logits of the blocks int64[R, K] as float32[R, K * size], -inf for columns from V on."""


class TorchKernels:
    """Plain PyTorch: about five passes over the logits and as much memory again."""

    def summarize(self, logits_RV: Tensor, size: int, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        whole = logits_RV.shape[1] // size * size
        parts = [_summary(logits_RV[:, :whole].float().unflatten(1, (-1, size)), temperatures)] if whole else []
        if whole < logits_RV.shape[1]:
            parts.append(_summary(logits_RV[:, None, whole:].float(), temperatures))
        return torch.cat([m for m, _ in parts], dim=-1), torch.cat([s for _, s in parts], dim=-1)

    def take(self, logits_RV: Tensor, blocks_RK: Tensor, size: int) -> Tensor:
        """See `Kernels`."""
        last = logits_RV.shape[1] - 1
        columns = (blocks_RK[:, :, None] * size + torch.arange(size, device=logits_RV.device)).flatten(1)
        taken = logits_RV.gather(1, columns.clamp(max=last)).float()
        return taken.masked_fill_(columns > last, -math.inf)


def _summary(logits_RBX: Tensor, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    maxima_RB = logits_RBX.amax(-1)
    shifted = logits_RBX - maxima_RB.masked_fill(maxima_RB == -math.inf, 0)[..., None]
    sums = [(shifted if t == 1 else shifted / t).exp_().sum(-1).log_() for t in reversed(temperatures)]
    return maxima_RB, torch.stack(sums[::-1], dim=1)  # T = 1 comes last and may overwrite


TORCH = TorchKernels()
"""They hold nothing, so one is enough."""


@dataclass(frozen=True)
class Plan:
    """What is read of each row: K and C are 0 and flags False for what no wanted field needs; `temperatures` is [N]."""

    top_k: int
    candidates: int
    token: bool
    tail: bool
    temperatures: tuple[float, ...]

    @staticmethod
    def of(spec: ScoreSpec, fields: frozenset[Field], candidates: int) -> Plan:
        """The plan for one specification; the same on every shard."""
        tail = Field.TAIL_LOGPROB in fields and spec.top_k > 0
        warm = spec.temperatures if tail or Field.LOG_NORMALIZER in fields else ()
        return Plan(
            top_k=spec.top_k if tail or Field.TOP in fields else 0,
            candidates=candidates if Field.CANDIDATE_LOGPROBS in fields else 0,
            token=Field.TOKEN_LOGPROBS in fields,
            tail=tail,
            temperatures=tuple(dict.fromkeys((1.0, *warm))),
        )

    @property
    def widths(self) -> list[int]:
        """Numbers of a packed row: maximum, normalisers, tails, token, candidates, top logits, top ids."""
        n = len(self.temperatures)
        return [1, n, n * self.tail, int(self.token), self.candidates, self.top_k, self.top_k]


def block_size(columns: int, top_k: int) -> int:
    """Columns of a block: the power of two near sqrt(V / K), which has the fewest maxima and chosen logits to sort."""
    ideal = math.sqrt(columns / max(top_k, 1))
    return min(256, max(16, 1 << round(math.log2(max(ideal, 1)))))


def read_shard(logits_RV: Tensor, rows: Rows, plan: Plan, kernels: Kernels, offset: int = 0) -> Tensor:
    """float32[R, W]: what `merge` needs of the columns whose first id is `offset`; may overwrite the logits.

    V may be 0. Maximum and logits are as they are; normalisers and tails are logsumexp((l - maximum) / T). A token or
    candidate of another shard is -inf here, like places of the top K beyond V: no part of any maximum or sum. Ids are
    the bits of int32, to be copied and not computed with.
    """
    r, v = logits_RV.shape
    if v == 0:
        return logits_RV.new_full((r, sum(plan.widths)), -math.inf, dtype=torch.float32)
    token_R1 = _pick(logits_RV, rows.targets[:, None] if plan.token else None, offset)
    asked_RC = _pick(logits_RV, rows.candidates if plan.candidates else None, offset)
    size = block_size(v, plan.top_k)
    maxima_RB, sums_RNB = kernels.summarize(logits_RV, size, plan.temperatures)
    maximum_R1 = maxima_RB.amax(1, keepdim=True)
    k = min(plan.top_k, v)
    few = 2 * k * size <= v
    blocks_RK = _largest(maxima_RB, k, ordered=False)[1] if k and few else None
    maxima_RB -= maximum_R1
    for i, t in enumerate(plan.temperatures):
        sums_RNB[:, i].add_(maxima_RB, alpha=1 / t)
    parts = [maximum_R1, torch.logsumexp(sums_RNB, dim=-1)]
    if not k:
        return torch.cat([*parts, token_R1, asked_RC], dim=1)
    if blocks_RK is not None:
        pool = kernels.take(logits_RV, blocks_RK, size)
        top_RK, places = _largest(pool, k)
        ids_RK = blocks_RK.gather(1, places // size) * size + places % size
    else:
        pool = logits_RV.float()
        top_RK, places = _largest(pool, k)
        ids_RK = places
    if plan.tail:
        pool = pool.scatter_(1, places, -math.inf).sub_(maximum_R1)
        inside = [torch.logsumexp(pool if t == 1 else pool * (1 / t), dim=-1) for t in plan.temperatures]
        tails_RN = torch.stack(inside, dim=1)
        if blocks_RK is not None:
            sums_RNB.scatter_(2, blocks_RK[:, None].expand(-1, len(plan.temperatures), -1), -math.inf)
            tails_RN = torch.logaddexp(tails_RN, torch.logsumexp(sums_RNB, dim=-1))
        parts.append(tails_RN)
    ids_RK = (ids_RK + offset).to(torch.int32)
    short = plan.top_k - k
    if short:
        top_RK = torch.nn.functional.pad(top_RK, (0, short), value=-math.inf)
        ids_RK = torch.nn.functional.pad(ids_RK, (0, short))
    return torch.cat([*parts, token_R1, asked_RC, top_RK, ids_RK.view(torch.float32)], dim=1)


def merge(packed_SRW: Tensor, spec: ScoreSpec, fields: frozenset[Field], candidates: int = 0) -> dict[str, Tensor]:
    """The wanted fields of R rows by name, and `finite` bool[R], from all shards' `read_shard` on one device.

    With m the row's maximum and z_T = logsumexp((l - m) / T): l = logit - m - z_1, C_T = z_T - z_1 / T (0 at T = 1),
    and the tail at T is the logsumexp of (l - m) / T over the complement of the top K, less z_T. K must not exceed the
    whole vocabulary. A row with fewer than K finite logits may name ids past the end for the others, whose
    log-probabilities are -inf; `Scores.finite` refuses such a row.
    """
    plan = Plan.of(spec, fields, candidates)
    maxima_SR1, z_SRN, tails_SRN, token_SR1, asked_SRC, top_SRK, ids_SRK = packed_SRW.split(plan.widths, dim=-1)
    shards, k = packed_SRW.shape[0], plan.top_k
    top_RK, ids_RK = top_SRK[0], ids_SRK[0].view(torch.int32)
    if shards == 1:
        maximum_R1, z_RN, tails_RN, token_R1, asked_RC = (
            maxima_SR1[0],
            z_SRN[0],
            tails_SRN[0],
            token_SR1[0],
            asked_SRC[0],
        )
    else:
        maximum_R1, token_R1, asked_RC = maxima_SR1.amax(0), token_SR1.amax(0), asked_SRC.amax(0)
        scales_N = inverse(plan.temperatures, packed_SRW.device)
        shift_SRN = (maxima_SR1 - maximum_R1) * scales_N
        z_RN = torch.logsumexp(z_SRN + shift_SRN, dim=0)
        if k:
            all_RQ = top_SRK.transpose(0, 1).flatten(1)
            top_RK, places = _largest(all_RQ, k)
            ids_RK = ids_SRK.view(torch.int32).transpose(0, 1).flatten(1).gather(1, places)
        if plan.tail:
            rest_RQ1 = (all_RQ.scatter(1, places, -math.inf) - maximum_R1)[:, :, None]
            beyond_RN = torch.logsumexp(rest_RQ1 * scales_N, dim=1)
            tails_RN = torch.logaddexp(torch.logsumexp(tails_SRN + shift_SRN, dim=0), beyond_RN)
    z1_R1 = z_RN[:, :1]
    log_total_R1 = maximum_R1 + z1_R1
    out: dict[str, Tensor] = {"finite": torch.isfinite(log_total_R1[:, 0])}
    if plan.token:
        out["token_logprobs"] = ((token_R1 - maximum_R1) - z1_R1)[:, 0]
    if plan.candidates:
        out["candidate_logprobs"] = (asked_RC - maximum_R1) - z1_R1
    if Field.TOP in fields and k:
        out["top_logprobs"], out["top_token_ids"] = (top_RK - maximum_R1) - z1_R1, ids_RK
    places_M = [plan.temperatures.index(t) for t in spec.temperatures] if fields & _WARM else []
    if Field.LOG_NORMALIZER in fields:
        out["log_normalizer"] = torch.stack([z_RN[:, i] - z_RN[:, 0] / plan.temperatures[i] for i in places_M], dim=1)
    if plan.tail:
        out["tail_logprob"] = torch.stack([tails_RN[:, i] - z_RN[:, i] for i in places_M], dim=1).clamp_(min=TAIL_FLOOR)
    return out


_WARM = frozenset({Field.LOG_NORMALIZER, Field.TAIL_LOGPROB})


def _pick(logits_RV: Tensor, ids_RC: Tensor | None, offset: int) -> Tensor:
    """float32[R, C]: the logits of these ids, -inf for an id of another shard; [R, 0] for None."""
    if ids_RC is None:
        return logits_RV.new_empty((logits_RV.shape[0], 0), dtype=torch.float32)
    local = ids_RC.to(logits_RV.device, torch.int64) - offset
    inside = local.clamp(0, logits_RV.shape[1] - 1)
    return logits_RV.gather(1, inside).float().masked_fill_(inside != local, -math.inf)


def _largest(values: Tensor, k: int, *, ordered: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their places; one alone is found by a plain maximum."""
    if k == 1:
        best = values.max(dim=-1, keepdim=True)
        return best.values, best.indices
    top = torch.topk(values, k, dim=-1, sorted=ordered)
    return top.values, top.indices


def inverse(temperatures: tuple[float, ...], device: torch.device) -> Tensor:
    """1 / T as float32[N], filled in place: a copy from the host would wait for all work before it."""
    scales_N = torch.empty(len(temperatures), device=device)
    for i, t in enumerate(temperatures):
        scales_N[i] = 1 / t
    return scales_N
