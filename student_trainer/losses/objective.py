"""What is minimised at each position, as a function of the few numbers that are read out of student and teacher.

alpha * soft(T) * (T^2 if t_squared) + beta * cross-entropy(T = 1). Knows no logits, no head and no chunks: the
reference and the chunked implementation both end here. Legend: N positions, K ids of the support. All values in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .divergences import SOFT_LOSSES, forward_kl, generalized_jsd, reverse_kl
from .sampled import SAMPLED_LOSSES, reverse_kl_sampled_tail
from .targets import Buckets, TeacherTargets

LOSSES: tuple[str, ...] = (*SOFT_LOSSES, "reverse_kl_sampled_tail", *SAMPLED_LOSSES)
"""Every name that `Objective.loss` takes; a divergence that is added to SOFT_LOSSES is one too."""


@dataclass(frozen=True)
class Objective:
    """Which loss, and how it is weighed; ValueError for a value that makes no sense. The temperature is the
    targets'."""

    loss: str = "forward_kl"
    """One of LOSSES, or a divergence that was added to SOFT_LOSSES."""
    jsd_beta: float = 0.5
    """b of the generalised JSD; unused by other losses."""
    alpha: float = 1.0
    """Weight of the soft loss."""
    beta: float = 0.0
    """Weight of the cross-entropy on the token that stands there, at temperature 1."""
    t_squared: bool = False
    """Multiply the soft loss by T^2, so that its gradient keeps its size as T grows (Hinton et al., 2015)."""
    importance_clip: tuple[float, float] = (0.0, 2.0)
    """Bounds of an importance weight, where the loss is given the rollout's log-probabilities (see importance.py)."""

    def __post_init__(self) -> None:
        known = (*SOFT_LOSSES, *(name for name in LOSSES if name not in SOFT_LOSSES))
        if self.loss not in known:
            raise ValueError(f"loss must be one of {', '.join(known)}, got {self.loss!r}")
        if not 0 <= self.jsd_beta <= 1:
            raise ValueError(f"jsd_beta must be from 0 to 1, got {self.jsd_beta}")
        if not (0 <= self.alpha < float("inf") and 0 <= self.beta < float("inf")):
            raise ValueError(f"alpha and beta must be finite and at least 0, got {self.alpha} and {self.beta}")
        low, high = self.importance_clip
        if not 0 <= low <= high:
            raise ValueError(f"importance_clip must be 0 <= low <= high, got {self.importance_clip}")

    @property
    def on_sampled_token(self) -> bool:
        """Whether the loss needs the token that was sampled and its score, not a support alone."""
        return self.loss not in SOFT_LOSSES

    def soft_scale(self, temperature: float) -> float:
        """alpha, times T^2 where that is asked for."""
        return self.alpha * (temperature**2 if self.t_squared else 1.0)


class Readout(NamedTuple):
    """What a loss needs of the student's logits at N positions.

    `buckets` float[N,K], float[N] at the loss's temperature; `token_logprob_N` float[N] of the token that stands
    there, at that temperature; `token_logprob_at_1_N` the same at temperature 1. The last two are None where nobody
    asked.
    """

    buckets: Buckets
    token_logprob_N: Tensor | None
    token_logprob_at_1_N: Tensor | None


@dataclass(frozen=True, eq=False)
class Metrics:
    """Detached float32[N] of each position, for reports; None where the inputs do not tell.

    `soft_N` and `hard_N` are the two parts before alpha, beta and T^2 (`hard_N` only where beta > 0). Forward and
    reverse KL are bucketed, at the loss's temperature, whatever the loss; tails are masses from 0 to 1 at that
    temperature, and a large teacher's tail says that top_k is too small. `student_entropy_N` is over the whole
    vocabulary at that temperature. `token_logprob_N` is the student's, at that temperature; `importance_weight_N` is
    there where rollouts came with theirs, and `soft_N` is weighed by it.
    """

    soft_N: Tensor
    forward_kl_N: Tensor
    reverse_kl_N: Tensor
    teacher_tail_N: Tensor
    student_tail_N: Tensor
    student_entropy_N: Tensor
    hard_N: Tensor | None = None
    token_logprob_N: Tensor | None = None
    importance_weight_N: Tensor | None = None

    @staticmethod
    def join(parts: list[Metrics]) -> Metrics:
        """Consecutive chunks as one; at least one part."""
        columns: dict[str, Any] = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Metrics)}
        joined: dict[str, Any] = {name: None if c[0] is None else torch.cat(c) for name, c in columns.items()}
        return Metrics(**joined)

    def detached(self) -> Metrics:
        """The same in float32 and without gradients."""
        columns = {f.name: getattr(self, f.name) for f in fields(Metrics)}
        plain: dict[str, Any] = {name: None if c is None else c.detach().float() for name, c in columns.items()}
        return Metrics(**plain)


def evaluate(
    objective: Objective,
    student: Readout,
    targets: TeacherTargets,
    student_entropy_N: Tensor,
    importance_weight_N: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """(float[N] differentiable in the readout, metrics): alpha * soft * (T^2) + beta * cross-entropy at each position.

    `importance_weight_N` float[N], detached, multiplies a divergence, or the sampled term of an estimator. ValueError
    where the loss needs tokens or their scores and the targets have none.
    """
    teacher = targets.buckets()
    w: Tensor | float = 1.0 if importance_weight_N is None else importance_weight_N
    if objective.on_sampled_token:
        student_token_N, teacher_token_N = student.token_logprob_N, targets.token_logprobs_at_temperature()
        if student_token_N is None or targets.token_ids_N is None:
            raise ValueError(f"the loss {objective.loss} needs token_ids_N, and these targets have none")
        if objective.loss == "reverse_kl_sampled_tail":
            in_support_N = (targets.ids_NK == targets.token_ids_N[:, None]).any(-1)
            soft_N = reverse_kl_sampled_tail(
                student.buckets, teacher, student_token_N, teacher_token_N, in_support_N, w
            )
        else:
            soft_N = SAMPLED_LOSSES[objective.loss](student_token_N, teacher_token_N, w)
    elif objective.loss == "jsd":
        soft_N = w * generalized_jsd(student.buckets, teacher, objective.jsd_beta)
    else:
        soft_N = w * SOFT_LOSSES[objective.loss](student.buckets, teacher)
    total_N = objective.soft_scale(targets.temperature) * soft_N
    hard_N: Tensor | None = None
    if objective.beta > 0:
        if student.token_logprob_at_1_N is None:
            raise ValueError("beta is above 0, and the targets have no token_ids_N for the cross-entropy")
        hard_N = -student.token_logprob_at_1_N
        total_N = total_N + objective.beta * hard_N
    with torch.no_grad():
        metrics = Metrics(
            soft_N,
            forward_kl(student.buckets, teacher),
            reverse_kl(student.buckets, teacher),
            teacher.tail_logprob_N.exp(),
            student.buckets.tail_logprob_N.exp(),
            student_entropy_N,
            hard_N,
            student.token_logprob_N,
            importance_weight_N,
        ).detached()
    return total_N, metrics
