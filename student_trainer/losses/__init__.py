"""Distillation losses: pure functions of tensors, with torch and nothing else.

`distillation_loss` is what a stage calls: hidden states, head, targets and an objective in, a loss and metrics out,
in chunks of positions. `targets` holds what the teacher said, `full` what its whole distribution is made of,
`divergences` and `sampled` the formulas, `importance` weighs old rollouts, `objective` puts them together, `chunked`
and `head` compute them without the logits of all positions, `reference` on whole logits.
docs/losses.md says why each is right.
"""

from .chunked import LossOutput, Targets, distillation_loss, distillation_loss_from_logits, student_top_k
from .divergences import SOFT_LOSSES, forward_kl, generalized_jsd, reverse_kl
from .full import FullTargets, exact_logits
from .head import Head
from .importance import ImportanceWeights, importance_weights
from .objective import LOSSES, Metrics, Objective
from .reference import cross_entropy, full_divergence, reference_loss, soft_loss, student_buckets
from .sampled import SAMPLED_LOSSES, k2, k3, policy_gradient, reverse_kl_sampled_tail
from .targets import CANDIDATE_TAIL_RESOLUTION, TAIL_FLOOR, Buckets, TeacherTargets

__all__ = [
    "CANDIDATE_TAIL_RESOLUTION",
    "LOSSES",
    "SAMPLED_LOSSES",
    "SOFT_LOSSES",
    "TAIL_FLOOR",
    "Buckets",
    "FullTargets",
    "Head",
    "ImportanceWeights",
    "LossOutput",
    "Metrics",
    "Objective",
    "Targets",
    "TeacherTargets",
    "cross_entropy",
    "distillation_loss",
    "distillation_loss_from_logits",
    "exact_logits",
    "forward_kl",
    "full_divergence",
    "generalized_jsd",
    "importance_weights",
    "k2",
    "k3",
    "policy_gradient",
    "reference_loss",
    "reverse_kl",
    "reverse_kl_sampled_tail",
    "soft_loss",
    "student_buckets",
    "student_top_k",
]
