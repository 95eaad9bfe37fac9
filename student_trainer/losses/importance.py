"""Importance weights for rollouts that an older student sampled, or the same one at another temperature.

An estimator on a sampled token is weighed by that token's own ratio pi_now / pi_rollout. A divergence at a position
is exact whatever token stands there; what is old about it is the prefix that it is taken at. With D(y_<t) the
divergence between student and teacher after y_<t, the on-policy gradient (through the divergences, not through the
sampling) is

    E_{y ~ now} sum_t grad D(y_<t) = E_{y ~ rollout} sum_t w_<t grad D(y_<t)
    w_<t = prod_{s<t} pi_now(y_s) / pi_rollout(y_s)

because y_<t is all of y that D(y_<t) depends on; the token at t and those after it sum to one. So w_<1 is 1, the
token at t itself does not count, and a product never runs over the border of a sequence. Clipping to [low, high]
bounds the variance and costs a bias towards the old prefixes (truncated importance sampling, Ionides 2008).

All weights are detached. Legend: N positions, n positions of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .objective import Objective

Clip = tuple[float, float]


def importance_weights(now_N: Tensor, rollout_N: Tensor, clip: Clip = (0.0, 2.0)) -> Tensor:
    """float[N], detached: pi_now(y) / pi_rollout(y) clipped to [low, high], from log-probabilities in nats.

    `now_N` at the loss's temperature, `rollout_N` as the sampler drew (its own temperature).
    """
    return (now_N.detach() - rollout_N).exp().clamp(*clip)


class ImportanceWeights:
    """The weights of N positions, asked for in consecutive chunks, in order.

    `rollout_logprobs_N` float[N] are the sampler's. With `begins_N` bool[N], true at the first position of each
    sequence, they are the prefix weights w_<t; the positions of a sequence must be consecutive. Without it they are
    the tokens' own. `clip` bounds each weight.
    """

    def __init__(self, rollout_logprobs_N: Tensor, begins_N: Tensor | None, clip: Clip) -> None:
        self.rollout_logprobs_N, self.begins_N, self.clip = rollout_logprobs_N.detach(), begins_N, clip
        self._before: Tensor | None = None

    def of(self, rows: slice, now_n: Tensor) -> Tensor:
        """float[n], detached: the weights of positions `rows`; `now_n` float[n] are the student's log-probabilities of
        the tokens there at the loss's temperature.
        """
        rollout_n = self.rollout_logprobs_N[rows]
        if self.begins_N is None:
            return importance_weights(now_n, rollout_n, self.clip)
        # Sums over thousands of tokens, of which differences are taken.
        ratio_n = now_n.detach().double() - rollout_n.double()
        if not len(ratio_n):
            return ratio_n.to(now_n.dtype)
        until_n = ratio_n.cumsum(0) - ratio_n
        places_n = torch.arange(len(ratio_n), device=ratio_n.device)
        begin_n = torch.where(self.begins_N[rows], places_n, -1).cummax(0).values
        before = until_n.new_zeros(()) if self._before is None else self._before
        log_n = until_n - torch.where(begin_n >= 0, until_n.gather(0, begin_n.clamp(min=0)), -before)
        self._before = log_n[-1] + ratio_n[-1]
        return log_n.exp().clamp(*self.clip).to(now_n.dtype)


def weights_for(
    objective: Objective, rollout_logprobs_N: Tensor | None, begins_N: Tensor | None
) -> ImportanceWeights | None:
    """The weights that a loss takes: an estimator the tokens' own, a divergence those of the prefixes; None without
    the sampler's log-probabilities. ValueError where a divergence gets no `begins_N`, or an estimator gets some.
    """
    if rollout_logprobs_N is None:
        return None
    if objective.on_sampled_token != (begins_N is None):
        what = "tokens and take no" if objective.on_sampled_token else "prefixes and need"
        raise ValueError(f"the importance weights of the loss {objective.loss} are those of {what} begins_N")
    return ImportanceWeights(rollout_logprobs_N, begins_N, objective.importance_clip)
