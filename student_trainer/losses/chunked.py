"""The losses in chunks of positions, with the LM head inside each chunk: logits of all positions never exist.

One pass computes the values and the gradients of hidden states and head, chunk by chunk, as Liger Kernel's fused
linear losses do (Hsu et al., 2024); backward only scales them. Inside a chunk every loss is a function of a few
numbers of each position (`Readout`), so autograd runs on these and the way back to the V logits is written out: with
z = logits / T, g the derivatives by the log-probabilities of the support, the tail and the token, and G their sum,

    dL/dz_i = g_i - p_i G on the support, q_i (g_tail - r G) off it, and + g_token at the token,

with q the softmax over the complement.

Legend: N positions, n positions of a chunk, K ids of the support, H hidden size, V logits of one position (padding
included).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .full import FullTargets, full_chunk
from .fused import fused_loss, kernels_for
from .head import Gradients, Head, Projector, check_fit, real_size
from .importance import ImportanceWeights, weights_for
from .objective import Metrics, Objective, Readout, evaluate
from .targets import TAIL_FLOOR, Buckets, TeacherTargets

CHUNK_BYTES = 2**29
"""Size of a chunk's logits in float32, from which the default number of positions follows (883 for Qwen3; half as many
with full targets). The largest moment of a chunk is up to three such arrays, or seven of half the size; beside it stand
the head's gradient in float32 and one in its own dtype.
"""


class LossOutput(NamedTuple):
    """`loss`, a scalar to call backward on (once), and the detached `metrics` of each position."""

    loss: Tensor
    metrics: Metrics


class _Attach(torch.autograd.Function):
    """A value whose gradients are known already; backward multiplies them by the incoming one, in place."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, scale: Tensor, grads: list[Tensor | None], *inputs: Tensor) -> Tensor:
        ctx.grads, ctx.scale, ctx.dtypes = grads, scale, [x.dtype for x in inputs]
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Any, ...]:
        if ctx.grads is None:
            raise RuntimeError("backward of this loss ran already; its gradients are freed by the first one")
        grads, ctx.grads = ctx.grads, None
        scale = grad_output * ctx.scale
        scaled = (None if g is None else g.mul_(scale).to(d) for g, d in zip(grads, ctx.dtypes, strict=True))
        return (None, None, None, *scaled)


def _chunks(n: int, width: int, chunk_size: int | None) -> Iterator[slice]:
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    size = chunk_size or max(1, CHUNK_BYTES // (4 * width))
    return (slice(first, min(first + size, n)) for first in range(0, n, size))


Targets = TeacherTargets | FullTargets
"""What the teacher said: a support and its tail, or what its whole distribution is made of."""


def _column(ids_n: Tensor) -> Tensor:
    return ids_n[:, None]


def _chunk(
    projector: Projector,
    rows: slice,
    targets: Targets,
    objective: Objective,
    weights_n: Tensor,
    importance: ImportanceWeights | None,
    need_grad: bool,
) -> tuple[Tensor, Metrics, Tensor | None]:
    """(float[n] values, metrics, float[n,V] gradient of their weighted sum by the logits, or None)."""
    if isinstance(targets, FullTargets):
        return full_chunk(projector, rows, targets, objective, weights_n, importance, need_grad)
    temperature, ids_nK, token_n = targets.temperature, targets.ids_NK, targets.token_ids_N
    # Centred before anything else: log-probabilities then carry no rounding from the size of the logits.
    z_nV = projector.logits(rows)
    z_nV -= z_nV.amax(-1, keepdim=True)
    at_1_n = p_1_nV = None
    if objective.beta > 0 and temperature != 1 and token_n is not None:
        p_1_nV = z_nV.exp()
        mass_1_n = p_1_nV.sum(-1)
        at_1_n = z_nV.gather(1, _column(token_n))[:, 0] - mass_1_n.log()
        p_1_nV = p_1_nV.div_(_column(mass_1_n)) if need_grad else None
    z_nV /= temperature
    support_nK = z_nV.gather(1, ids_nK)
    chosen_n = None if token_n is None else z_nV.gather(1, _column(token_n))[:, 0]
    z_nV.scatter_(1, ids_nK, -torch.inf)
    rest_n = z_nV.logsumexp(-1)
    lse_n = torch.logaddexp(support_nK.logsumexp(-1), rest_n)
    no_rest_n = rest_n == -torch.inf
    tail_n = (rest_n - lse_n).masked_fill(no_rest_n, TAIL_FLOOR)
    # q, the softmax over the complement: 0 on the support, on padding, and where there is no complement.
    q_nV = z_nV.sub_(rest_n.masked_fill(no_rest_n, 0.0)[:, None]).exp_()

    leaves = [support_nK - lse_n[:, None], tail_n]
    if chosen_n is not None:
        leaves.append(chosen_n - lse_n)
        if at_1_n is not None:
            leaves.append(at_1_n)
    leaves = [leaf.requires_grad_(need_grad) for leaf in leaves]
    token = leaves[2] if chosen_n is not None else None
    at_1 = leaves[3] if at_1_n is not None else token if temperature == 1 else None
    readout = Readout(Buckets(leaves[0], leaves[1]), token, at_1)
    importance_n = None if importance is None or token is None else importance.of(rows, token)
    with torch.no_grad():
        within_n = (leaves[0].exp() * leaves[0]).sum(-1) + tail_n.exp() * (tail_n - torch.special.entr(q_nV).sum(-1))
    with torch.set_grad_enabled(need_grad):
        total_n, metrics = evaluate(objective, readout, targets, -within_n, importance_n)
        weighted = (total_n * weights_n).sum()
    if not need_grad:
        return total_n, metrics, None
    g_support_nK, g_tail_n, *g_tokens = torch.autograd.grad(weighted, leaves, allow_unused=True, materialize_grads=True)
    g_sum_n = g_support_nK.sum(-1) + g_tail_n + (g_tokens[0] if g_tokens else 0)
    grad_nV = q_nV.mul_((g_tail_n - tail_n.detach().exp() * g_sum_n)[:, None])
    grad_nV.scatter_(1, ids_nK, g_support_nK - leaves[0].detach().exp() * g_sum_n[:, None])
    if token_n is not None:
        grad_nV.scatter_add_(1, _column(token_n), _column(g_tokens[0]))
    grad_nV /= temperature
    if p_1_nV is not None and token_n is not None:
        grad_nV -= p_1_nV.mul_(_column(g_tokens[1]))
        grad_nV.scatter_add_(1, _column(token_n), _column(g_tokens[1]))
    return total_n.detach(), metrics, grad_nV


def _check(
    x: Tensor,
    vocab_size: int,
    targets: Targets,
    weights_N: Tensor | None,
    rollout_N: Tensor | None,
    begins_N: Tensor | None,
    validate: bool,
) -> None:
    n = int(x.shape[0])
    if len(targets) != n:
        raise ValueError(f"the student has {n} positions, the targets have {len(targets)}")
    if rollout_N is not None and targets.token_ids_N is None:
        raise ValueError("rollout_logprobs_N needs token_ids_N, and these targets have none")
    for name, tensor in (("weights_N", weights_N), ("rollout_logprobs_N", rollout_N), ("begins_N", begins_N)):
        if tensor is not None and list(tensor.shape) != [n]:
            raise ValueError(f"{name} must have shape [{n}], got {list(tensor.shape)}")
    if targets.device != x.device:
        raise ValueError(f"the targets are on {targets.device}, the student is on {x.device}")
    if isinstance(targets, FullTargets) and targets.head.weight_VH.device != x.device:
        raise ValueError(f"the teacher's head is on {targets.head.weight_VH.device}, the student is on {x.device}")
    if not validate:
        return
    targets.check(vocab_size)
    if n:
        _finite("student's input", torch.stack(x.detach().aminmax(dim=-1), 1))
    for name, tensor in (("weights_N", weights_N), ("rollout_logprobs_N", rollout_N)):
        if tensor is not None:
            _finite(name, tensor.detach()[:, None])


def _finite(name: str, values_NX: Tensor) -> None:
    bad_N = ~values_NX.isfinite().all(-1)
    if bool(bad_N.any()):
        row = int(bad_N.nonzero()[0, 0])
        raise ValueError(f"{name}: {int(bad_N.sum())} of {len(bad_N)} rows are not finite, the first is row {row}")


def _run(
    x: Tensor,
    head: Head | None,
    vocab_size: int,
    targets: Targets,
    objective: Objective,
    weights_N: Tensor | None,
    rollout_N: Tensor | None,
    begins_N: Tensor | None,
    chunk_size: int | None,
    validate: bool,
) -> LossOutput:
    # Whatever stands in padded logits, it is not read.
    _check(x if head is not None else x[:, :vocab_size], vocab_size, targets, weights_N, rollout_N, begins_N, validate)
    with torch.no_grad():
        projector = Projector(x, head, vocab_size)
        weights = torch.ones(len(x), device=x.device) if weights_N is None else weights_N.detach()
        weights = weights.to(projector.accurate)
        # Weights are about one over the tokens of a batch; scaled to 1 inside, so that narrow dtypes do not lose them.
        scale = weights.abs().max() if len(x) else weights.new_ones(())
        scale = torch.where(scale > 0, scale, 1.0)
    importance = weights_for(objective, rollout_N, begins_N)
    need_grad = torch.is_grad_enabled() and any(i.requires_grad for i in projector.inputs)
    kernels = kernels_for(x.device) if chunk_size is None and head is not None and x.dtype != torch.float64 else None
    if kernels is not None:
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            found = fused_loss(projector, targets, objective, weights / scale, importance, kernels, need_grad)
            loss = (found.values_N * weights).sum()
        if need_grad:
            loss = _Attach.apply(loss, scale, found.gradients, *projector.inputs)
        return LossOutput(loss, found.metrics)
    gradients = Gradients(projector) if need_grad else None
    loss, parts = weights.new_zeros(()), []
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        # No position still makes one empty chunk, so that every metric is there.
        width = (2 if isinstance(targets, FullTargets) else 1) * projector.width
        for rows in [*_chunks(len(x), width, chunk_size)] or [slice(0, 0)]:
            part = targets.rows(rows.start, rows.stop)
            w_n = weights[rows] / scale
            values_n, metrics, grad_nV = _chunk(projector, rows, part, objective, w_n, importance, need_grad)
            loss += (values_n * weights[rows]).sum()
            parts.append(metrics)
            if gradients is not None and grad_nV is not None:
                gradients.add(rows, grad_nV)
                del grad_nV
    if gradients is not None:
        loss = _Attach.apply(loss, scale, gradients.finished(), *projector.inputs)
    return LossOutput(loss, Metrics.join(parts))


def distillation_loss(
    hidden_NH: Tensor,
    head: Head,
    targets: Targets,
    objective: Objective,
    *,
    weights_N: Tensor | None = None,
    rollout_logprobs_N: Tensor | None = None,
    begins_N: Tensor | None = None,
    chunk_size: int | None = None,
    validate: bool = True,
) -> LossOutput:
    """sum_n weights[n] (alpha soft[n] (T^2) + beta cross-entropy[n]) in nats, with metrics of each position.

    `hidden_NH` float[N,H] are the last hidden states that predict the targets' tokens (position P - 1 + r for the
    r-th token of a completion that starts at P), in the dtype of the head unless autocast is on. `weights_N` float[N]
    (default 1) are usually the mask over the number of completion tokens in the whole global batch.
    `rollout_logprobs_N` float[N], the sampler's own, turn on importance weights: of the tokens in the losses on sampled
    tokens, of the prefixes in divergences, which need `begins_N` bool[N], true at each sequence's first position, to
    know them. `chunk_size` is in positions. `validate` checks ids, masses and finiteness of all inputs but the head,
    and waits for the device. The result is float32 (float64 for float64). Differentiable in hidden states, head weight
    and bias, once. No position is fine: the loss is 0 and so are the gradients. ValueError for shapes, dtypes and
    devices that do not fit, for what `TeacherTargets.check` refuses, non-finite inputs, and targets that lack what the
    objective needs.
    """
    check_fit(hidden_NH, head)
    size = real_size(head.vocab_size, int(head.weight_VH.shape[0]))
    return _run(
        hidden_NH, head, size, targets, objective, weights_N, rollout_logprobs_N, begins_N, chunk_size, validate
    )


def distillation_loss_from_logits(
    logits_NV: Tensor,
    targets: Targets,
    objective: Objective,
    *,
    vocab_size: int | None = None,
    weights_N: Tensor | None = None,
    rollout_logprobs_N: Tensor | None = None,
    begins_N: Tensor | None = None,
    chunk_size: int | None = None,
    validate: bool = True,
) -> LossOutput:
    """`distillation_loss` for a head that is no plain matrix: from `logits_NV` float[N,V], at temperature 1, padding
    included.

    Only a chunk is ever held in float32; the gradient has the dtype of the logits. Otherwise the same, errors too.
    """
    if logits_NV.ndim != 2:
        raise ValueError(f"logits_NV must have 2 dimensions, got shape {list(logits_NV.shape)}")
    size = real_size(vocab_size, int(logits_NV.shape[1]))
    return _run(
        logits_NV, None, size, targets, objective, weights_N, rollout_logprobs_N, begins_N, chunk_size, validate
    )


@torch.no_grad()
def student_top_k(hidden_NH: Tensor, head: Head, k: int, *, chunk_size: int | None = None) -> Tensor:
    """int64[N,k]: the student's own k most likely ids, most likely first, of the real vocabulary alone; no gradient.

    They are chosen by the distribution and not by the sampled token, as `reverse_kl_sampled_tail` needs. ValueError
    for a k outside 1..vocab_size.
    """
    check_fit(hidden_NH, head)
    size = real_size(head.vocab_size, int(head.weight_VH.shape[0]))
    if not 1 <= k <= size:
        raise ValueError(f"k must be from 1 to {size}, the real vocabulary, got {k}")
    projector = Projector(hidden_NH, head, size)
    ids_NK = torch.empty((len(hidden_NH), k), dtype=torch.int64, device=hidden_NH.device)
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for rows in _chunks(len(hidden_NH), projector.width, chunk_size):
            ids_NK[rows] = projector.logits(rows).topk(k, dim=-1).indices
    return ids_NK
