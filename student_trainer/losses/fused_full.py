"""What the fused losses read of the student's and the teacher's logits where the whole distribution is compared, and
the gradient; the formulas are full.py's.

One look at every block gives both normalisers and both Kullback-Leibler divergences; the JSD takes a second one.
Legend: n positions, B ids of a block, V logits of one position.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .divergences import SOFT_LOSSES
from .full import FullTargets, exact_logits
from .fused_support import Look, Weigh
from .head import Head, Projector
from .kernels import FullSlopes, FullSums, Kernels, real_of
from .objective import Metrics, Objective


class FullReader:
    """The steps of a loss over some positions: each of `looks` at every block, `solve`, `differentiate` every block.

    `keep`: the teacher's logits of a block are held until the block has been differentiated, in place of computing them
    for each look.
    """

    def __init__(
        self, targets: FullTargets, objective: Objective, projector: Projector, kernels: Kernels, *, keep: bool
    ) -> None:
        if objective.loss not in SOFT_LOSSES:
            raise ValueError(f"the loss {objective.loss} is an estimator, which a full distribution has no use for")
        tokens_n = targets.token_ids_N
        if objective.beta > 0 and tokens_n is None:
            raise ValueError("beta is above 0, and the targets have no token_ids_N for the cross-entropy")
        n, device = len(targets), targets.device
        self.targets, self.objective, self.kernels, self.keep = targets, objective, kernels, keep
        none_n = torch.full((n,), -1, dtype=torch.int32, device=device)
        self.tokens_n = none_n if tokens_n is None else tokens_n.int()
        self.sums = FullSums.empty(n, projector.accurate, device)
        self.kind = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(objective.jsd_beta, "jsd")
        if objective.loss != "jsd":
            self.kind = objective.loss
        self._kept: dict[int, Tensor] = {}
        self._slopes: FullSlopes | None = None

    @staticmethod
    def bytes_each(itemsize: int) -> int:
        """Bytes that are held for a logit of the student of `itemsize` bytes: the teacher's is float32."""
        return itemsize + 4

    @property
    def looks(self) -> tuple[Look, ...]:
        """What each block is shown to before `solve`, all blocks to one after the other."""
        return (self._compare, self._mix) if self.kind == "jsd" else (self._compare,)

    def _teacher(self, columns: slice) -> tuple[Tensor, int]:
        """float[n,B] logits of the teacher, and how many of them are the vocabulary's."""
        real = real_of(columns, self.targets.vocab_size)
        kept = self._kept.get(columns.start)
        if kept is None:
            head, ids = self.targets.head, slice(columns.start, columns.start + real)
            bias = None if head.bias_V is None else head.bias_V[ids]
            kept = exact_logits(self.targets.hidden_NW, Head(head.weight_VH[ids], bias)) if real else head.weight_VH[:0]
            if self.keep:
                self._kept[columns.start] = kept
        return kept, real

    def _compare(self, block_nB: Tensor, columns: slice) -> None:
        teacher_nB, real = self._teacher(columns)
        if real:
            t = self.targets.temperature
            self.kernels.compare(block_nB, teacher_nB, columns.start, real, self.tokens_n, self.sums, t)

    def _mix(self, block_nB: Tensor, columns: slice) -> None:
        teacher_nB, real = self._teacher(columns)
        if real:
            self.kernels.mix(block_nB, teacher_nB, real, self.sums, self._shifts(), self.targets.temperature)

    def differentiate(self, block_nB: Tensor, columns: slice) -> None:
        """Overwrites a student's block by the gradient; after `solve`."""
        assert self._slopes is not None
        teacher_nB, real = self._teacher(columns)
        if real:
            t = self.targets.temperature
            self.kernels.differentiate_full(block_nB, teacher_nB, columns.start, real, self.tokens_n, self._slopes, t)
        else:
            block_nB.zero_()

    def _shifts(self) -> FullSlopes:
        """Normalisers, with slopes that are not known yet."""
        if self._slopes is None:
            sums, t = self.sums, self.targets.temperature
            shift_n = sums.max_N / t + sums.mass_N.log()
            teacher_shift_n = sums.teacher_max_N / t + sums.teacher_mass_N.log()
            shift_1_n = sums.max_N + sums.mass_1_N.log()
            nothing_n = torch.zeros_like(shift_n)
            b = self.objective.jsd_beta
            self._slopes = FullSlopes(self.kind, b, nothing_n, shift_n, teacher_shift_n, nothing_n, None, shift_1_n)
        return self._slopes

    def solve(self, weights_n: Tensor, weigh: Weigh | None, need_grad: bool) -> tuple[Tensor, Metrics]:
        """Values and metrics of the positions, and, kept for `differentiate`, what the gradient of the values' weighted
        sum is made of.
        """
        sums, t, objective, shifts = self.sums, self.targets.temperature, self.objective, self._shifts()
        log_mass_n, teacher_log_mass_n = sums.mass_N.log(), sums.teacher_mass_N.log()
        minus_entropy_n = sums.own_N / sums.mass_N - log_mass_n
        forward_n = (sums.teacher_own_N - sums.teacher_cross_N) / sums.teacher_mass_N - teacher_log_mass_n + log_mass_n
        reverse_n = minus_entropy_n - (sums.cross_N / sums.mass_N - teacher_log_mass_n)
        has_tokens = self.targets.token_ids_N is not None
        token_n = sums.token_N / t - shifts.shift_N if has_tokens else None
        b, value_n = objective.jsd_beta, reverse_n
        soft_n = forward_n if self.kind == "forward_kl" else reverse_n
        if self.kind == "jsd":
            value_n = sums.mixed_N
            soft_n = b * sums.teacher_mixed_N + (1 - b) * sums.mixed_N
        importance_n = None if weigh is None or token_n is None else weigh(token_n)
        if importance_n is not None:
            soft_n = importance_n * soft_n
        scale = objective.soft_scale(t)
        values_n = scale * soft_n
        hard_n = shifts.shift_1_N - sums.token_N if objective.beta > 0 else None
        if hard_n is not None:
            values_n = values_n + objective.beta * hard_n
        none_n = torch.zeros_like(soft_n)
        metrics = Metrics(
            soft_n, forward_n, reverse_n, none_n, none_n, -minus_entropy_n, hard_n, token_n, importance_n
        ).detached()
        if need_grad:
            slope_n = weights_n * (scale / t) if importance_n is None else weights_n * importance_n * (scale / t)
            slope_1_n = weights_n * objective.beta if objective.beta > 0 else None
            self._slopes = replace(shifts, slope_N=slope_n, value_N=value_n, slope_1_N=slope_1_n)
        return values_n, metrics
