"""A micro-batch as the arguments of the student's forward pass.

Knows rows and a model's attention; no teacher, loss or Trainer. Legend: B rows, L columns, N completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .batches import Row, pad


def forward_inputs(model: Any, rows: Sequence[Row], pad_id: int, device: torch.device) -> dict[str, Any]:
    """Keyword arguments for `model`, which accepted an objective: `input_ids` int64[B,L] and `places` int64[N].

    Completion tokens come in the order of `rows`, as `batches.completion_ids` gives them.
    """
    padded = pad(rows, pad_id)
    return {
        "input_ids": torch.from_numpy(padded.input_ids).to(device),
        "places": torch.from_numpy(padded.places).to(device),
    }
