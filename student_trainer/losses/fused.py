"""The losses in blocks of the vocabulary, with kernels that read a block of logits once: what a GPU runs, in less time
and memory than the chunks of chunked.py, to the same numbers.

Where the head trains and positions are many, the logits are computed twice, for all positions a block of the vocabulary
at a time: first for the few sums that every loss is a function of, then for the gradient, whose product with the hidden
states is that block of the head's gradient, whole. So the sum over positions happens inside one product, in float32,
and no second copy of the head's gradient (4 bytes a weight) stands beside it; the price is a fourth product of this
size beside the three that a loss needs. Where the head is frozen or positions are few, the logits of some positions and
the whole vocabulary are computed once. What is read and how gradients follow is fused_support.py's and fused_full.py's.

Legend: N positions, n of them, B ids of a block, H hidden size, V logits of one position (padding included).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from .full import FullTargets
from .fused_full import FullReader
from .fused_support import SupportReader
from .head import Projector
from .importance import ImportanceWeights
from .kernels import Kernels, disagreement
from .objective import Metrics, Objective
from .targets import TeacherTargets

log = logging.getLogger(__name__)

ONCE_BYTES = 2**29
"""Most bytes of logits where they are computed once: 1,766 positions of Qwen3 in 16 bits."""
BLOCK_BYTES = 2**26
"""Bytes of a block's logits where they are computed twice, but never fewer ids than BLOCK_IDS: narrower products are
slower, and the hidden states grow with the block then."""
BLOCK_IDS = 2048


class Fused(NamedTuple):
    """float[N] values, metrics, and gradients of the values' weighted sum by hidden states, weight and bias (None where
    not needed), in their input's dtype, float16 excepted, which is too narrow for numbers that are not scaled yet.
    """

    values_N: Tensor
    metrics: Metrics
    gradients: list[Tensor | None]


@cache
def kernels_for(device: torch.device) -> Kernels | None:
    """The compiled kernels, once they have given on this device what `TorchKernels` gives; None where they cannot."""
    if device.type != "cuda":
        return None
    try:
        from .kernels_triton import TritonKernels

        wrong = disagreement(TritonKernels(), device)
    except Exception as error:  # noqa: BLE001 - whatever keeps Triton from compiling, there is another way
        wrong = (str(error).strip() or type(error).__name__).splitlines()[0]
    if wrong:
        log.warning("losses run in PyTorch, slower and in more memory, as the Triton kernels do not work: %s", wrong)
        return None
    return TritonKernels()


def fused_loss(
    projector: Projector,
    targets: TeacherTargets | FullTargets,
    objective: Objective,
    weights_N: Tensor,
    importance: ImportanceWeights | None,
    kernels: Kernels,
    need_grad: bool,
) -> Fused:
    """What `chunked.distillation_loss` computes; the same errors. Without autograd."""
    head, n, width = projector.head, len(projector.x), projector.width
    assert head is not None
    x_NH, weight_VH, bias_V = projector.x.detach().to(projector.dtype), head.weight_VH.detach(), head.bias_V
    grads = [_room(tensor) if need_grad and tensor.requires_grad else None for tensor in projector.inputs]
    by_x, by_weight, by_bias = (*grads, None, None)[:3]
    read = FullReader if isinstance(targets, FullTargets) else SupportReader
    bytes_each = read.bytes_each(x_NH.element_size())
    once = max(1, ONCE_BYTES // (bytes_each * width))
    twice = n > once and (by_weight is not None or by_bias is not None)
    block = max(BLOCK_IDS, BLOCK_BYTES // (bytes_each * max(n, 1))) if twice else width
    sum_x = torch.zeros_like(x_NH, dtype=projector.accurate) if twice and by_x is not None else None

    def logits(rows: slice, columns: slice) -> Tensor:
        part_BH = weight_VH[columns].to(projector.dtype)
        if bias_V is None:
            return x_NH[rows] @ part_BH.T
        return torch.addmm(bias_V.detach()[columns].to(projector.dtype), x_NH[rows], part_BH.T)

    def collect(rows: slice, columns: slice, grad_nB: Tensor) -> None:
        if by_weight is not None:
            _product(grad_nB.T, x_NH[rows], by_weight[columns])
        if by_bias is not None:
            by_bias[columns] = grad_nB.sum(0, dtype=projector.accurate)
        if sum_x is not None:
            _add_product(sum_x, grad_nB, weight_VH[columns].to(projector.dtype))
        elif by_x is not None:
            _product(grad_nB, weight_VH[columns].to(projector.dtype), by_x[rows])

    parts: list[tuple[Tensor, Metrics]] = []
    for rows in _slices(n, n if twice else once):
        reader = read(targets.rows(rows.start, rows.stop), objective, projector, kernels, keep=not twice)  # type: ignore[arg-type]
        z_nB = None if twice else logits(rows, slice(0, width))
        for look in reader.looks:
            for columns in _slices(width, block):
                look(logits(rows, columns) if z_nB is None else z_nB, columns)
        weigh = None if importance is None else partial(importance.of, rows)
        parts.append(reader.solve(weights_N[rows], weigh, need_grad))
        if need_grad:
            for columns in _slices(width, block):
                grad_nB = logits(rows, columns) if z_nB is None else z_nB
                reader.differentiate(grad_nB, columns)
                collect(rows, columns, grad_nB)
                del grad_nB
        del z_nB
    if sum_x is not None and by_x is not None:
        by_x.copy_(sum_x)
    return Fused(torch.cat([values for values, _ in parts]), Metrics.join([metrics for _, metrics in parts]), grads)


def _slices(n: int, step: int) -> Iterator[slice]:
    # No position still makes one empty slice, so that every metric is there.
    return (slice(first, min(first + step, n)) for first in range(0, max(n, 1), max(step, 1)))


def _room(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, dtype=torch.float32 if tensor.dtype == torch.float16 else tensor.dtype)


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b, summed in float32 or better."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a.to(out.dtype) @ b.to(out.dtype))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in the total's dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a.to(total.dtype) @ b.to(total.dtype)
