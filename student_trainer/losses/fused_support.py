"""What the fused losses read of the student's logits where the teacher gave a support and its tail, and the gradient.

With q the softmax of the logits / T over the complement of the support and g the derivatives by the log-probabilities
of support, tail and token, G their sum, dL/d(logits / T) is what chunked.py says: g_i - p_i G on the support,
q_i (g_tail - r G) off it, and + g_token at the token. Legend: n positions, B ids of a block, K ids of the support.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .head import Projector
from .kernels import Kernels, Places, Slopes, Sums, real_of
from .objective import Metrics, Objective, Readout, evaluate
from .targets import TAIL_FLOOR, Buckets, TeacherTargets

Weigh = Callable[[Tensor], Tensor]
"""float[n] log-probabilities of the tokens now -> float[n] importance weights."""
Look = Callable[[Tensor, slice], None]
"""float[n,B] logits of the ids of a slice."""


class SupportReader:
    """The steps of a loss over some positions: each of `looks` at every block, `solve`, `differentiate` every block."""

    def __init__(
        self, targets: TeacherTargets, objective: Objective, projector: Projector, kernels: Kernels, *, keep: bool
    ) -> None:
        self.targets, self.objective, self.kernels, self.size = targets, objective, kernels, projector.vocab_size
        tokens_n = targets.token_ids_N
        none_n = torch.full((len(targets),), -1, dtype=torch.int32, device=targets.device)
        self.places = Places(targets.ids_NK.int(), none_n if tokens_n is None else tokens_n.int())
        in_support_n = (self.places.ids_NK == self.places.tokens_N[:, None]).any(-1)
        self._outside = Places(self.places.ids_NK, self.places.tokens_N.masked_fill(in_support_n, -1))
        self.sums = Sums.empty(self.places, projector.accurate)
        self._slopes: Slopes | None = None

    @staticmethod
    def bytes_each(itemsize: int) -> int:
        """Bytes that are held for a logit of the student of `itemsize` bytes."""
        return itemsize

    @property
    def looks(self) -> tuple[Look, ...]:
        """What each block is shown to before `solve`, all blocks to one after the other."""
        return (self._absorb,)

    def _absorb(self, block_nB: Tensor, columns: slice) -> None:
        real = real_of(columns, self.size)
        self.kernels.absorb(block_nB, columns.start, real, self.places, self.sums, self.targets.temperature)

    def differentiate(self, block_nB: Tensor, columns: slice) -> None:
        """Overwrites a block by the gradient; after `solve`."""
        assert self._slopes is not None
        real, t = real_of(columns, self.size), self.targets.temperature
        self.kernels.differentiate(block_nB, columns.start, real, self._outside, self._slopes, t)

    def solve(self, weights_n: Tensor, weigh: Weigh | None, need_grad: bool) -> tuple[Tensor, Metrics]:
        """Values and metrics of the positions, and, kept for `differentiate`, what the gradient of the values' weighted
        sum is made of.
        """
        sums, t, token_ids_n = self.sums, self.targets.temperature, self.targets.token_ids_N
        # Centred before anything else: log-probabilities then carry no rounding from the size of the logits.
        has_support = sums.support_NK.shape[1] > 0
        center_n = torch.maximum(sums.max_N, sums.support_NK.amax(-1)) if has_support else sums.max_N
        no_rest_n = sums.max_N == -torch.inf
        above_n = (sums.max_N - center_n).masked_fill(no_rest_n, 0.0)
        support_1_nK, token_1_n = sums.support_NK - center_n[:, None], sums.token_N - center_n
        rest_n = (above_n / t + sums.mass_N.log()).masked_fill(no_rest_n, -torch.inf)
        rest_1_n = (above_n + sums.mass_1_N.log()).masked_fill(no_rest_n, -torch.inf)
        lse_n = torch.logaddexp((support_1_nK / t).logsumexp(-1), rest_n)
        lse_1_n = torch.logaddexp(support_1_nK.logsumexp(-1), rest_1_n)
        tail_n = (rest_n - lse_n).masked_fill(no_rest_n, TAIL_FLOOR)
        hard = self.objective.beta > 0 and t != 1 and token_ids_n is not None
        leaves = [support_1_nK / t - lse_n[:, None], tail_n]
        if token_ids_n is not None:
            leaves.append(token_1_n / t - lse_n)
            if hard:
                leaves.append(token_1_n - lse_1_n)
        leaves = [leaf.requires_grad_(need_grad) for leaf in leaves]
        token = leaves[2] if token_ids_n is not None else None
        readout = Readout(Buckets(leaves[0], leaves[1]), token, leaves[3] if hard else token if t == 1 else None)
        with torch.no_grad():
            entropy_n = (sums.mass_N.log() - sums.moment_N / sums.mass_N).masked_fill(no_rest_n, 0.0)
            within_n = (leaves[0].exp() * leaves[0]).sum(-1) + tail_n.exp() * (tail_n - entropy_n)
        importance_n = None if weigh is None or token is None else weigh(token)
        with torch.set_grad_enabled(need_grad):
            values_n, metrics = evaluate(self.objective, readout, self.targets, -within_n, importance_n)
            weighted = (values_n * weights_n).sum()
        if not need_grad:
            return values_n, metrics
        g_support_nK, g_tail_n, *g_tokens = torch.autograd.grad(
            weighted, leaves, allow_unused=True, materialize_grads=True
        )
        with torch.no_grad():
            g_token_n = g_tokens[0] if g_tokens else torch.zeros_like(g_tail_n)
            g_sum_n = g_support_nK.sum(-1) + g_tail_n + g_token_n
            slope_n = ((g_tail_n - tail_n.exp() * g_sum_n) / t).masked_fill(no_rest_n, 0.0)
            at_support_nK = (g_support_nK - leaves[0].exp() * g_sum_n[:, None]) / t
            own_n = g_token_n / t
            at_token_n = slope_n * (token_1_n / t - rest_n).exp()
            slope_1_n = shift_1_n = None
            if hard:
                slope_1_n, shift_1_n = -g_tokens[1], lse_1_n + center_n
                at_support_nK += slope_1_n[:, None] * (support_1_nK - lse_1_n[:, None]).exp()
                at_token_n += slope_1_n * (token_1_n - lse_1_n).exp()
                own_n = own_n + g_tokens[1]
            if token_ids_n is not None:
                at_support_nK += own_n[:, None] * (self.targets.ids_NK == token_ids_n[:, None])
            shift_n = (center_n / t + rest_n).masked_fill(no_rest_n, torch.inf)
        self._slopes = Slopes(at_support_nK, at_token_n + own_n, slope_n, shift_n, slope_1_n, shift_1_n)
        return values_n.detach(), metrics
