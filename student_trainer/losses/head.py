"""An LM head; and a student's, applied to some positions at a time: logits forth, gradients back.

Knows no loss and no teacher. Legend: N positions, n positions of a chunk, H hidden size, V logits of one position
(padding included).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Head:
    """An LM head: the whole, gathered `weight_VH` float[V,H], `bias_V` float[V] or None, and the real
    vocabulary.

    Rows from `vocab_size` on are padding: they get no probability and no gradient (None: all rows are real). A weight
    that is tied to the embedding is passed like any other. ValueError for shapes that do not fit.
    """

    weight_VH: Tensor
    bias_V: Tensor | None = None
    vocab_size: int | None = None

    def __post_init__(self) -> None:
        if self.weight_VH.ndim != 2:
            raise ValueError(f"weight_VH must have 2 dimensions, got shape {list(self.weight_VH.shape)}")
        width = self.weight_VH.shape[0]
        if self.bias_V is not None and list(self.bias_V.shape) != [width]:
            raise ValueError(f"bias_V must have shape [{width}], got {list(self.bias_V.shape)}")
        real_size(self.vocab_size, width)

    def to(self, device: torch.device | str) -> Head:
        """The same on another device, or itself where it is there."""
        weight_VH = self.weight_VH.to(device)
        bias_V = None if self.bias_V is None else self.bias_V.to(device)
        return self if weight_VH is self.weight_VH else Head(weight_VH, bias_V, self.vocab_size)


def real_size(vocab_size: int | None, width: int) -> int:
    """The number of real logits of `width`; ValueError for one that does not fit."""
    size = width if vocab_size is None else vocab_size
    if not 1 <= size <= width:
        raise ValueError(f"vocab_size must be from 1 to the {width} rows of the head, got {vocab_size}")
    return size


class Projector:
    """Turns rows of the input into logits, and gradients by logits into gradients of input, weight and bias.

    Without a head the input is the logits. Under autocast the product runs in autocast's dtype, as the model's own
    would. The head's gradients are summed in float32 (float64 for float64).
    """

    def __init__(self, x: Tensor, head: Head | None, vocab_size: int) -> None:
        self.x, self.head, self.vocab_size = x, head, vocab_size
        self.inputs = [x] if head is None else [x, head.weight_VH, *([] if head.bias_V is None else [head.bias_V])]
        self.dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            self.dtype = torch.get_autocast_dtype(x.device.type)
        self.accurate = torch.promote_types(x.dtype, torch.float32)
        self.weight_VH = None if head is None else head.weight_VH.detach().to(self.dtype)
        self.width = int(x.shape[1] if head is None else head.weight_VH.shape[0])

    def logits(self, rows: slice) -> Tensor:
        """float[n,V] that the caller may overwrite, in float32 or better, with -inf in the padded columns."""
        x = self.x[rows].detach()
        if self.weight_VH is None:
            z = x.to(self.accurate, copy=True)
        else:
            z = (x.to(self.dtype) @ self.weight_VH.T).to(self.accurate)
            if self.head is not None and self.head.bias_V is not None:
                z += self.head.bias_V.detach().to(z.dtype)
        z[:, self.vocab_size :] = -torch.inf
        return z


class Gradients:
    """Gradients of the inputs that need them, in the order of the projector's, gathered chunk by chunk.

    Kept in each input's dtype, float16 excepted, which is too narrow for numbers that are not scaled yet.
    """

    def __init__(self, projector: Projector) -> None:
        head, x = projector.head, projector.x
        self.projector = projector
        wide = projector.accurate
        self.x = torch.empty_like(x, dtype=wide if x.dtype == torch.float16 else x.dtype) if x.requires_grad else None
        self.weight = self.bias = None
        if head is not None and head.weight_VH.requires_grad:
            self.weight = torch.zeros_like(head.weight_VH, dtype=wide)
        if head is not None and head.bias_V is not None and head.bias_V.requires_grad:
            self.bias = torch.zeros_like(head.bias_V, dtype=wide)

    def add(self, rows: slice, grad_nV: Tensor) -> None:
        """Takes the gradient by one chunk's logits."""
        p = self.projector
        if self.bias is not None:
            self.bias += grad_nV.sum(0)
        if p.weight_VH is None:
            if self.x is not None:
                self.x[rows] = grad_nV
            return
        grad_nV = grad_nV.to(p.dtype)
        if self.x is not None:
            self.x[rows] = grad_nV @ p.weight_VH
        if self.weight is not None:
            self.weight += grad_nV.T @ p.x[rows].detach().to(p.dtype)

    def finished(self) -> list[Tensor | None]:
        """One gradient or None for each input."""
        grads = [self.x] if self.projector.head is None else [self.x, self.weight, self.bias]
        return [
            None if grad is None else grad if given.dtype == torch.float16 else grad.to(given.dtype)
            for grad, given in zip(grads, self.projector.inputs, strict=False)
        ]


def check_fit(hidden_NH: Tensor, head: Head) -> None:
    """ValueError where hidden states and head differ in width, or in dtype without autocast to settle it."""
    weight_VH = head.weight_VH
    if hidden_NH.ndim != 2 or hidden_NH.shape[1] != weight_VH.shape[1]:
        raise ValueError(f"hidden_NH is {list(hidden_NH.shape)}, which does not fit a head of {list(weight_VH.shape)}")
    if hidden_NH.dtype != weight_VH.dtype and not torch.is_autocast_enabled(hidden_NH.device.type):
        raise ValueError(f"hidden_NH is {hidden_NH.dtype}, the head {weight_VH.dtype}; use one dtype, or autocast")
