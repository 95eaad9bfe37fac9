"""Estimators of the reverse KL's gradient from a token y that the student itself sampled.

Each returns one number for each position: its value is an estimate, its gradient is what the docstring says. All need
y ~ p_s at the loss's temperature over the whole vocabulary (top_p 1, no top-k), or weights that correct for what y
was sampled from. rho = l_t(y) - l_s(y), l_s recomputed when learning. k1, k2, k3 are those of J. Schulman,
"Approximating KL divergence" (2020). Back-propagating k1 = -rho is not offered: its expected gradient is zero.
Legend: N positions, K ids.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .targets import Buckets


def _with_gradient_of(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def policy_gradient(student_token_N: Tensor, teacher_token_N: Tensor, weight_N: Tensor | float = 1.0) -> Tensor:
    """float[N]: REINFORCE with the detached advantage rho; the value is -rho, an unbiased estimate of the reverse KL.

    Gradient -weight rho grad l_s(y), in expectation that of the full reverse KL. Arguments are l_s(y), l_t(y)
    float[N] at the loss's temperature, and detached importance weights.
    """
    minus_rho_N = (student_token_N - teacher_token_N).detach()
    return _with_gradient_of(weight_N * minus_rho_N, weight_N * minus_rho_N * student_token_N)


def k2(student_token_N: Tensor, teacher_token_N: Tensor, weight_N: Tensor | float = 1.0) -> Tensor:
    """float[N]: rho^2 / 2, back-propagated. Expected gradient: the reverse KL's. As a value it is biased, of low
    variance."""
    return weight_N * (teacher_token_N - student_token_N).square() / 2


def k3(student_token_N: Tensor, teacher_token_N: Tensor, weight_N: Tensor | float = 1.0) -> Tensor:
    """float[N]: e^rho - 1 - rho, back-propagated. Value: unbiased for the reverse KL. Expected gradient: the FORWARD
    KL's.

    Heavy tails: e^rho is large wherever the teacher likes what the student does not.
    """
    rho_N = teacher_token_N - student_token_N
    return weight_N * (torch.expm1(rho_N) - rho_N)


def reverse_kl_sampled_tail(
    student: Buckets,
    teacher: Buckets,
    student_token_N: Tensor,
    teacher_token_N: Tensor,
    in_support_N: Tensor,
    weight_N: Tensor | float = 1.0,
) -> Tensor:
    """float[N]: the full reverse KL, exact on a support S and sampled off it; best where S is the student's own top K.

    gradient = sum_S p_s (l_s - l_t) grad l_s + 1[y not in S] weight (l_s(y) - l_t(y)) grad l_s(y), coefficients
    detached: unbiased for the full reverse KL with y ~ p_s, if S was chosen without looking at y (the student's or
    the teacher's top K were). The value is the same sum without the gradients, also unbiased. `in_support_N` bool[N]
    says whether y is in S. The tails of the buckets are not used. Importance weights apply to the sampled term alone.
    """
    ratio_NK = (student.logprobs_NK - teacher.logprobs_NK).detach()
    coefficient_NK = student.logprobs_NK.detach().exp() * ratio_NK
    token_N = (weight_N * (student_token_N - teacher_token_N).detach()).masked_fill(in_support_N, 0.0)
    surrogate_N = (coefficient_NK * student.logprobs_NK).sum(-1) + token_N * student_token_N
    return _with_gradient_of(coefficient_NK.sum(-1) + token_N, surrogate_N)


SAMPLED_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor | float], Tensor]] = {
    "policy_gradient": policy_gradient,
    "k2": k2,
    "k3": k3,
}
"""Estimators on the sampled token alone, by the names of the configuration."""
