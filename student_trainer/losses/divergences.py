"""Divergences between two next-token distributions of K + 1 outcomes, one value for each position.

The tail, all that is outside the support, is one outcome. Merging outcomes never increases a divergence, so each is a
lower bound of the one over the full vocabulary and equals it where the support is the vocabulary. Plain
differentiable functions; whoever calls them has applied the temperature on both sides. Legend: N positions, K ids of
the support. All values in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .targets import TAIL_FLOOR, Buckets


def forward_kl(student: Buckets, teacher: Buckets) -> Tensor:
    """float[N]: KL(teacher, student) = sum_S p_t (l_t - l_s) + r_t (log r_t - log r_s).

    The gradient in a student's logit is p_s - p_t on the support and p_s (1 - r_t / r_s) off it (Hinton et al., 2015,
    "Distilling the knowledge in a neural network", with the tail as one class). A teacher's tail at TAIL_FLOOR has no
    mass and adds nothing.
    """
    support_N = (teacher.logprobs_NK.exp() * (teacher.logprobs_NK - student.logprobs_NK)).sum(-1)
    tail_N = teacher.tail_logprob_N.exp() * (teacher.tail_logprob_N - student.tail_logprob_N)
    return support_N + tail_N.masked_fill(teacher.tail_logprob_N <= TAIL_FLOOR, 0.0)


def reverse_kl(student: Buckets, teacher: Buckets) -> Tensor:
    """float[N]: KL(student, teacher) = sum_S p_s (l_s - l_t) + r_s (log r_s - log r_t).

    The gradient in a student's logit i is p_s(i) (d_i - value), d_i the log-ratio of i's own outcome (Gu et al.,
    2024, "MiniLLM", with the tail as one outcome). log r_t is at least TAIL_FLOOR, so mass where the teacher has none
    costs at most 100 nats.
    """
    support_N = (student.logprobs_NK.exp() * (student.logprobs_NK - teacher.logprobs_NK)).sum(-1)
    return support_N + student.tail_logprob_N.exp() * (student.tail_logprob_N - teacher.tail_logprob_N)


def generalized_jsd(student: Buckets, teacher: Buckets, b: float = 0.5) -> Tensor:
    """float[N]: b KL(p_t, m) + (1 - b) KL(p_s, m), m = b p_t + (1 - b) p_s, over the K + 1 outcomes.

    Agarwal et al., 2024, "On-policy distillation of language models" (GKD), equation 1. The formula vanishes at both
    ends, so b = 0 is defined as the forward and b = 1 as the reverse KL, the limits of value / b and value / (1 - b).
    ValueError where b is not in [0, 1].
    """
    if not 0 <= b <= 1:
        raise ValueError(f"b of the generalised JSD must be from 0 to 1, got {b}")
    if b == 0:
        return forward_kl(student, teacher)
    if b == 1:
        return reverse_kl(student, teacher)
    p = Buckets(*(torch.logaddexp(t + math.log(b), s + math.log1p(-b)) for s, t in zip(student, teacher, strict=True)))
    # KL(p_t, m) and KL(p_s, m) are both reverse KLs of their first argument.
    return b * reverse_kl(teacher, p) + (1 - b) * reverse_kl(student, p)


SOFT_LOSSES: dict[str, Callable[[Buckets, Buckets], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": generalized_jsd,
}
"""Divergences by the names of the configuration; `jsd` also takes b."""
