"""The same losses on whole logits in plain PyTorch: what the chunked implementation must equal, and the
full-vocabulary divergences.

Written to be read, not to be fast: it holds [N,V] several times and leaves the gradients to autograd. Legend: N
positions, K ids of the support, V logits of one position, of which the first `vocab_size` are real. All values in
nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergences import SOFT_LOSSES, generalized_jsd
from .importance import weights_for
from .objective import Metrics, Objective, Readout, evaluate
from .targets import TAIL_FLOOR, Buckets, TeacherTargets


def log_softmax(logits_NV: Tensor, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """float[N,vocab_size]: log-softmax of logits / T over the real vocabulary, in float32 or better."""
    logits_NV = logits_NV[:, :vocab_size]
    return (logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32)) / temperature).log_softmax(-1)


def cross_entropy(logits_NV: Tensor, token_ids_N: Tensor, vocab_size: int | None = None) -> Tensor:
    """float[N]: -log p_s of the token that stands there, at temperature 1."""
    return -log_softmax(logits_NV, 1.0, vocab_size).gather(1, token_ids_N[:, None])[:, 0]


def student_buckets(
    logits_NV: Tensor, ids_NK: Tensor, temperature: float = 1.0, vocab_size: int | None = None
) -> Buckets:
    """The student's K + 1 outcomes; the tail is the complement's logsumexp, TAIL_FLOOR where there is no complement."""
    logprobs_NV = log_softmax(logits_NV, temperature, vocab_size)
    if ids_NK.shape[1] == logprobs_NV.shape[1]:
        tail_N = logprobs_NV.new_full(logprobs_NV.shape[:1], TAIL_FLOOR)
    else:
        tail_N = logprobs_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1)
    return Buckets(logprobs_NV.gather(1, ids_NK), tail_N)


def soft_loss(
    logits_NV: Tensor,
    targets: TeacherTargets,
    loss: str = "forward_kl",
    jsd_beta: float = 0.5,
    vocab_size: int | None = None,
) -> Tensor:
    """float[N], differentiable in the logits: a divergence of SOFT_LOSSES at the targets' temperature."""
    student = student_buckets(logits_NV, targets.ids_NK, targets.temperature, vocab_size)
    if loss == "jsd":
        return generalized_jsd(student, targets.buckets(), jsd_beta)
    return SOFT_LOSSES[loss](student, targets.buckets())


def full_divergence(
    student_logits_NV: Tensor,
    teacher_logits_NV: Tensor,
    loss: str = "forward_kl",
    temperature: float = 1.0,
    jsd_beta: float = 0.5,
    vocab_size: int | None = None,
) -> Tensor:
    """float[N]: the exact divergence over the whole vocabulary, both sides at T, from both models' logits."""
    log_s, log_t = (log_softmax(z, temperature, vocab_size) for z in (student_logits_NV, teacher_logits_NV))

    def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    if loss == "forward_kl" or (loss == "jsd" and jsd_beta == 0):
        return kl(log_t, log_s)
    if loss == "reverse_kl" or (loss == "jsd" and jsd_beta == 1):
        return kl(log_s, log_t)
    if loss != "jsd":
        raise ValueError(f"loss must be one of {', '.join(SOFT_LOSSES)}, got {loss!r}")
    log_m = (jsd_beta * log_t.exp() + (1 - jsd_beta) * log_s.exp()).log()
    return jsd_beta * kl(log_t, log_m) + (1 - jsd_beta) * kl(log_s, log_m)


def reference_loss(
    logits_NV: Tensor,
    targets: TeacherTargets,
    objective: Objective,
    *,
    vocab_size: int | None = None,
    weights_N: Tensor | None = None,
    rollout_logprobs_N: Tensor | None = None,
    begins_N: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """(scalar, metrics): what `distillation_loss` computes, on whole logits; the same arguments and errors."""
    logprobs_NV = log_softmax(logits_NV, targets.temperature, vocab_size)
    token_N = at_1_N = None
    if targets.token_ids_N is not None:
        token_N = logprobs_NV.gather(1, targets.token_ids_N[:, None])[:, 0]
        at_1_N = -cross_entropy(logits_NV, targets.token_ids_N, vocab_size)
    entropy_N = -(logprobs_NV.exp() * logprobs_NV).sum(-1)
    buckets = student_buckets(logits_NV, targets.ids_NK, targets.temperature, vocab_size)
    importance, weight_N = weights_for(objective, rollout_logprobs_N, begins_N), None
    if importance is not None and token_N is not None:
        weight_N = importance.of(slice(0, len(token_N)), token_N)
    total_N, metrics = evaluate(objective, Readout(buckets, token_N, at_1_N), targets, entropy_N, weight_N)
    return (total_N if weights_N is None else total_N * weights_N).sum(), metrics
