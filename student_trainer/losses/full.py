"""Divergences over the whole vocabulary, from the teacher's hidden states and its LM head, a chunk at a time.

Nothing is truncated: the teacher's logits of a chunk are computed beside the student's and dropped with them. With
z = logits / T, T the loss's temperature, and s and t the log-softmaxes of student and teacher over the real vocabulary,

    forward KL  sum p_t (t - s)                      dL/dz = p_s - p_t
    reverse KL  R = sum p_s (s - t)                  dL/dz = p_s (s - t - R)
    JSD(b)      b KL(p_t, m) + (1 - b) KL(p_s, m)    dL/dz = (1 - b) p_s (a - sum p_s a), a = s - log m

with m = b p_t + (1 - b) p_s; JSD(0) and JSD(1) are defined as the forward and the reverse KL (see divergences.py).

Legend: N positions, n positions of a chunk, H and W hidden sizes of student and teacher, V logits of one position
(padding included), R real vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .divergences import SOFT_LOSSES
from .head import Head, Projector, real_size
from .importance import ImportanceWeights
from .objective import Metrics, Objective

SLICE_BYTES = 2**26
"""Size of the slices of a half-precision head that are widened to float32 in turn, where no GPU does it in passing."""

ALIGNED = 128
"""Columns of which a product should have a multiple."""


@dataclass(frozen=True, eq=False)
class FullTargets:
    """The teacher's whole distribution at N positions, as what it is made of.

    `hidden_NW` float[N,W] are its final hidden states in its own dtype and `head` its LM head [R,W] over the real
    vocabulary, whose logits are head @ state (+ bias), summed in float32; `temperature` is the loss's T. `token_ids_N`
    int64[N] are the tokens that stand there, for the cross-entropy. The head may already be on the device that `to`
    names. Shapes are checked when it is made (ValueError); `check` looks at the numbers.
    """

    hidden_NW: Tensor
    head: Head
    temperature: float = 1.0
    token_ids_N: Tensor | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature must be finite and above 0, got {self.temperature}")
        hidden_NW, weight = self.hidden_NW, self.head.weight_VH
        if hidden_NW.ndim != 2 or hidden_NW.shape[1] != weight.shape[1] or not hidden_NW.is_floating_point():
            raise ValueError(
                f"hidden_NW is {hidden_NW.dtype}{list(hidden_NW.shape)}, which does not fit a head of "
                f"{list(weight.shape)}"
            )
        tokens_N = self.token_ids_N
        if tokens_N is not None and (tokens_N.dtype != torch.int64 or tokens_N.shape != hidden_NW.shape[:1]):
            raise ValueError(f"token_ids_N must be int64[{len(hidden_NW)}], got {tokens_N.dtype}{list(tokens_N.shape)}")

    def __len__(self) -> int:
        return int(self.hidden_NW.shape[0])

    @property
    def device(self) -> torch.device:
        """Where the numbers of the positions are."""
        return self.hidden_NW.device

    @property
    def vocab_size(self) -> int:
        """R."""
        return real_size(self.head.vocab_size, int(self.head.weight_VH.shape[0]))

    def rows(self, first: int, last: int) -> FullTargets:
        """Positions first..last-1, without copying."""
        tokens_N = None if self.token_ids_N is None else self.token_ids_N[first:last]
        return replace(self, hidden_NW=self.hidden_NW[first:last], token_ids_N=tokens_N)

    def to(self, device: torch.device | str) -> FullTargets:
        """The same on another device; a head that is there already is not copied."""
        tokens_N = None if self.token_ids_N is None else self.token_ids_N.to(device, non_blocking=True)
        hidden_NW = self.hidden_NW.to(device, non_blocking=True)
        return replace(self, hidden_NW=hidden_NW, head=self.head.to(device), token_ids_N=tokens_N)

    def check(self, vocab_size: int) -> None:
        """ValueError for another vocabulary, ids outside it and hidden states that are not finite; waits for the
        device.
        """
        if self.vocab_size != vocab_size:
            raise ValueError(f"the teacher's head has {self.vocab_size} real rows, the student's {vocab_size}")
        if not len(self):
            return
        tokens_N = self.token_ids_N
        if tokens_N is not None and not 0 <= int(tokens_N.min()) <= int(tokens_N.max()) < vocab_size:
            raise ValueError(
                f"token_ids_N has ids from {int(tokens_N.min())} to {int(tokens_N.max())}, outside the vocabulary of "
                f"{vocab_size}"
            )
        bad_N = ~self.hidden_NW.isfinite().all(-1)
        if bool(bad_N.any()):
            row = int(bad_N.nonzero()[0, 0])
            raise ValueError(
                f"hidden_NW: {int(bad_N.sum())} of {len(self)} rows are not finite, the first is row {row}"
            )

    def logprobs(self) -> Tensor:
        """float[N,R]: the teacher's log-probabilities at T, in float32 or better."""
        z_NR = exact_logits(self.hidden_NW, self.head)
        z_NR -= z_NR.amax(-1, keepdim=True)
        z_NR /= self.temperature
        return z_NR.sub_(z_NR.logsumexp(-1, keepdim=True))


def exact_logits(hidden_nW: Tensor, head: Head) -> Tensor:
    """float[n,R]: head @ state (+ bias), products summed and returned in float32 (float64 for float64)."""
    size = real_size(head.vocab_size, int(head.weight_VH.shape[0]))
    weight_VW = head.weight_VH
    accurate = torch.promote_types(torch.promote_types(hidden_nW.dtype, weight_VW.dtype), torch.float32)
    if weight_VW.dtype == accurate:
        z_nR = hidden_nW.to(accurate) @ weight_VW[:size].T
    elif weight_VW.is_cuda and hidden_nW.dtype == weight_VW.dtype:
        # 151,669 columns are not aligned, which takes 6 times as long as 151,936: rows of an aligned length, and what
        # is left over of the columns on its own.
        z_nR = hidden_nW.new_empty((len(hidden_nW), -(-size // ALIGNED) * ALIGNED), dtype=accurate)[:, :size]
        aligned = size // ALIGNED * ALIGNED
        for ids in (slice(0, aligned), slice(aligned, size)):
            torch.mm(hidden_nW, weight_VW[ids].T, out_dtype=accurate, out=z_nR[:, ids])
    else:
        wide_nW = hidden_nW.to(accurate)
        z_nR = torch.empty((len(wide_nW), size), dtype=accurate, device=wide_nW.device)
        step = max(1, SLICE_BYTES // (4 * weight_VW.shape[1]))
        for first in range(0, size, step):
            last = min(size, first + step)
            z_nR[:, first:last] = wide_nW @ weight_VW[first:last].to(accurate).T
    return z_nR if head.bias_V is None else z_nR.add_(head.bias_V[:size].to(accurate))


def full_chunk(
    projector: Projector,
    rows: slice,
    targets: FullTargets,
    objective: Objective,
    weights_n: Tensor,
    importance: ImportanceWeights | None,
    need_grad: bool,
) -> tuple[Tensor, Metrics, Tensor | None]:
    """(float[n] values, metrics, float[n,V] gradient of their weighted sum by the logits, or None), written out."""
    if objective.loss not in SOFT_LOSSES:
        raise ValueError(f"the loss {objective.loss} is an estimator, which a full distribution has no use for")
    tokens_n, size, temperature = targets.token_ids_N, targets.vocab_size, targets.temperature
    if objective.beta > 0 and tokens_n is None:
        raise ValueError("beta is above 0, and the targets have no token_ids_N for the cross-entropy")
    z_nV = projector.logits(rows)
    s_nR = z_nV[:, :size]
    s_nR -= s_nR.amax(-1, keepdim=True)
    hard_n = p_1_nR = None
    if objective.beta > 0 and temperature != 1:
        log_mass_n = s_nR.logsumexp(-1)
        hard_n = log_mass_n - _of(s_nR, tokens_n)
        p_1_nR = (s_nR - log_mass_n[:, None]).exp_() if need_grad else None
    s_nR /= temperature
    s_nR -= s_nR.logsumexp(-1, keepdim=True)
    token_n = None if tokens_n is None else _of(s_nR, tokens_n)
    if objective.beta > 0 and temperature == 1 and token_n is not None:
        hard_n = -token_n
    p_s_nR = s_nR.exp()
    entropy_n = -(p_s_nR * s_nR).sum(-1)
    t_nR = targets.logprobs().to(s_nR.dtype)
    p_t_nR = t_nR.exp()
    ratio_nR = s_nR - t_nR
    forward_n, reverse_n = -(p_t_nR * ratio_nR).sum(-1), (p_s_nR * ratio_nR).sum(-1)
    soft_n, by_z_nR = _divergence(objective, s_nR, t_nR, p_s_nR, p_t_nR, ratio_nR, forward_n, reverse_n)
    importance_n = None if importance is None or token_n is None else importance.of(rows, token_n)
    if importance_n is not None:
        soft_n = importance_n * soft_n
    scale = objective.soft_scale(temperature)
    total_n = scale * soft_n
    if hard_n is not None:
        total_n = total_n + objective.beta * hard_n
    nothing_n = torch.zeros_like(soft_n)
    metrics = Metrics(
        soft_n, forward_n, reverse_n, nothing_n, nothing_n, entropy_n, hard_n, token_n, importance_n
    ).detached()
    if not need_grad:
        return total_n, metrics, None
    soft_weights_n = weights_n if importance_n is None else weights_n * importance_n
    by_z_nR *= (soft_weights_n * (scale / temperature))[:, None]
    if objective.beta > 0 and tokens_n is not None:
        hard_weight_n1 = (weights_n * objective.beta)[:, None]
        p_1_nR = s_nR.exp() if p_1_nR is None else p_1_nR
        by_z_nR += p_1_nR.mul_(hard_weight_n1)
        by_z_nR.scatter_add_(1, tokens_n[:, None], -hard_weight_n1)
    if projector.width > size:
        by_z_nR = torch.nn.functional.pad(by_z_nR, (0, projector.width - size))
    return total_n, metrics, by_z_nR


def _divergence(
    objective: Objective,
    s_nR: Tensor,
    t_nR: Tensor,
    p_s_nR: Tensor,
    p_t_nR: Tensor,
    ratio_nR: Tensor,
    forward_n: Tensor,
    reverse_n: Tensor,
) -> tuple[Tensor, Tensor]:
    """(float[n] value, float[n,R] derivative by logits / T) of the objective's divergence; overwrites probabilities."""
    b = objective.jsd_beta
    if objective.loss == "forward_kl" or (objective.loss == "jsd" and b == 0):
        return forward_n, p_s_nR.sub_(p_t_nR)
    if objective.loss == "reverse_kl" or (objective.loss == "jsd" and b == 1):
        return reverse_n, p_s_nR.mul_(ratio_nR.sub_(reverse_n[:, None]))
    m_nR = torch.logaddexp(t_nR + math.log(b), s_nR + math.log1p(-b))
    against_n = (p_t_nR.mul_(t_nR - m_nR)).sum(-1)
    own_nR = m_nR.neg_().add_(s_nR)
    own_n = (p_s_nR * own_nR).sum(-1)
    return b * against_n + (1 - b) * own_n, p_s_nR.mul_(own_nR.sub_(own_n[:, None])).mul_(1 - b)


def _of(rows_nR: Tensor, ids_n: Tensor | None) -> Tensor:
    assert ids_n is not None, "checked before"
    return rows_nR.gather(1, ids_n[:, None])[:, 0]
