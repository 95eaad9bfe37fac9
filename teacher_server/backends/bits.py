"""Tensors as numpy holds them, which has no bfloat16, and the names of their dtypes. Knows torch alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from protos.head import held_as
from protos.scores import Bits


def to_bits(tensor: Tensor) -> Bits:
    """A tensor of bfloat16, float16 or float32 as what holds it in numpy."""
    if held_as(dtype_name(tensor.dtype)) is np.float32:
        return tensor.cpu().numpy()
    return tensor.contiguous().view(torch.int16).cpu().numpy().view(np.uint16)


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
