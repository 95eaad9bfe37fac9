"""Draws one token for each row of a batch, every row by its own parameters and its own random numbers.

Knows logits and numbers, no model and no request. Sampling is by inverse distribution function: one uniform number in
[0, 1) decides a row's token, so a row's draws do not depend on the rest of the batch. Legend: B rows, R of them,
K alternatives, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from protos.scores import Floats, Ids

_BYTES = 2**28


@dataclass(frozen=True, eq=False)
class Draw:
    """Parameters of B rows on one device: float64[B], float32[B] twice, int64[B] twice.

    Temperature 0 is greedy; a row whose `forced` is not negative gets that token whatever its logits say.
    """

    uniform: Tensor
    temperature: Tensor
    top_p: Tensor
    top_k: Tensor
    forced: Tensor


def sample(logits_BV: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """Token ids int64[B] and their log-probabilities float32[B] at temperature 1, of float32 logits.

    `top_k` keeps the most likely tokens first, then `top_p` the smallest set of those with at least that mass.
    """
    step = max(1, _BYTES // (8 * logits_BV.shape[1]))
    parts = []
    for first in range(0, logits_BV.shape[0], step):
        rows = slice(first, first + step)
        some = Draw(draw.uniform[rows], draw.temperature[rows], draw.top_p[rows], draw.top_k[rows], draw.forced[rows])
        parts.append(_sample(logits_BV[rows], some))
    ids, logprobs = zip(*parts, strict=True)
    return torch.cat(ids), torch.cat(logprobs)


def alternatives(logits_BV: Tensor, wanted: list[int]) -> dict[int, tuple[Ids, Floats]]:
    """The most likely ids int32[K], most likely first, and log-probabilities float32[K] of rows that want K > 0.

    Of float32 logits; by index of the row.
    """
    at = [index for index, most in enumerate(wanted) if most]
    if not at:
        return {}
    rows_RV = logits_BV[at]
    top_RK, ids_RK = torch.topk(rows_RV, max(wanted), dim=-1)
    top_RK = top_RK - torch.logsumexp(rows_RV, dim=-1, keepdim=True)
    ids, numbers = ids_RK.to(torch.int32).cpu().numpy(), top_RK.cpu().numpy()
    return {index: (ids[i, : wanted[index]], numbers[i, : wanted[index]]) for i, index in enumerate(at)}


def _sample(logits_BV: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    normalizer_B = torch.logsumexp(logits_BV, dim=-1)
    greedy_B = draw.temperature == 0
    ids_B = logits_BV.argmax(-1)
    if not bool(greedy_B.all()):
        scaled_BV = logits_BV / torch.where(greedy_B, 1.0, draw.temperature)[:, None]
        cut_B = ((draw.top_p < 1) | (draw.top_k > 0)) & ~greedy_B
        drawn_B = _invert(torch.softmax(scaled_BV, -1), draw.uniform)
        if bool(cut_B.any()):
            at = cut_B.nonzero()[:, 0]
            drawn_B[at] = _sample_cut(scaled_BV[at], draw.uniform[at], draw.top_p[at], draw.top_k[at])
        ids_B = torch.where(greedy_B, ids_B, drawn_B)
    ids_B = torch.where(draw.forced >= 0, draw.forced, ids_B)
    return ids_B, logits_BV.gather(1, ids_B[:, None])[:, 0] - normalizer_B


def _sample_cut(scaled_BV: Tensor, uniform_B: Tensor, top_p_B: Tensor, top_k_B: Tensor) -> Tensor:
    width = scaled_BV.shape[1]
    most_B = torch.where(top_k_B > 0, top_k_B.clamp(max=width), width)
    sorted_BK, ids_BK = torch.topk(scaled_BV, int(most_B.max()), dim=-1)
    rank_K = torch.arange(sorted_BK.shape[1], device=sorted_BK.device)
    p_BK = torch.softmax(sorted_BK.masked_fill(rank_K >= most_B[:, None], -torch.inf), -1)
    before_BK = p_BK.cumsum(-1) - p_BK
    # A nucleus of 1 keeps all, also where rounding carries the sum past 1.
    keep_BK = (before_BK < top_p_B[:, None]) | (top_p_B[:, None] >= 1)
    return ids_BK.gather(1, _invert(p_BK * keep_BK, uniform_B)[:, None])[:, 0]


def _invert(p_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """The first index whose cumulated mass exceeds uniform * total; float64, since float32 would lose rare tokens."""
    cdf_BV = p_BV.cumsum(-1, dtype=torch.float64)
    total_B1 = cdf_BV[:, -1:]
    target_B1 = torch.minimum(uniform_B[:, None] * total_B1, total_B1 * (1 - 1e-15))
    return torch.searchsorted(cdf_BV, target_B1, right=True)[:, 0].clamp(max=p_BV.shape[1] - 1)
