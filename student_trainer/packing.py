"""A micro-batch as the arguments of the student's forward pass: one packed row, or padded rows.

Packed, all sequences stand in one row without padding, each with positions from 0 on, and attention is told where they
begin and end: FlashAttention by transformers, `sdpa` by packed_attention.py. Everything else in a transformer works on
single tokens. Whether a model can do that is decided once, when it is opened. Knows no teacher, loss or Trainer.
Legend: B rows, L columns, N completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import packed_attention
from .batches import Row, pack, pad
from .errors import UserError
from .objective_forward import causal_model

_LAYERS = {"full_attention", "sliding_attention"}


def obstacle(model: Any) -> str | None:
    """Why rows of this model cannot be packed, or None."""
    causal = causal_model(model)
    config = causal.config
    attention = str(config._attn_implementation)
    if attention != "sdpa" and "flash" not in attention:
        return f"{attention} attention holds a mask of the whole row; use sdpa or flash_attention_2"
    others = set(getattr(config, "layer_types", None) or _LAYERS) - _LAYERS
    name = type(causal).__name__
    if others:
        return f"layers of {name} ({', '.join(sorted(others))}) would carry one sequence into the next"
    if getattr(causal, "_is_stateful", False) or not getattr(causal, "_supports_attention_backend", False):
        return f"{name} cannot be told where sequences begin"
    return None


def set_up(model: Any, packing: bool | str) -> Any:
    """Decides for `model` whether its rows are packed: True, False, or `auto`, where it can; returns the model.

    UserError for True where it cannot.
    """
    reason = obstacle(model)
    if packing is True and reason is not None:
        raise UserError(f"rows cannot be packed: {reason}", "training.packing", "set it to auto or false")
    packed = packing is not False and reason is None
    if packed:
        packed_attention.enable()
    causal_model(model).packs_rows = packed
    return model


def packs(model: Any) -> bool:
    """What was decided for `model`; one for which nothing was decided is padded."""
    return bool(getattr(causal_model(model), "packs_rows", False))


def forward_inputs(model: Any, rows: Sequence[Row], pad_id: int, device: torch.device) -> dict[str, Any]:
    """Keyword arguments for `model`, which accepted an objective: `input_ids` int64[B,L] (packed: [1, all tokens]),
    `places` int64[N], the flat positions that predict the completion tokens, and what attention needs.

    Completion tokens come in the order of `rows`, as `batches.completion_ids` gives them.
    """
    causal = causal_model(model)
    if not packs(model):
        padded = pad(rows, pad_id)
        return {"input_ids": _to(padded.input_ids, device), "places": _to(padded.places, device)}
    packed = pack(rows)
    inputs: dict[str, Any] = {
        "input_ids": _to(packed.input_ids[None], device),
        "places": _to(packed.places, device),
        "position_ids": _to(packed.positions[None], device),
        **packed_attention.borders(packed.lengths, device),
    }
    if causal.config._attn_implementation == "sdpa":
        # A mask of four dimensions counts as made already; without one transformers would make one of L times L.
        inputs["attention_mask"] = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=device)
        inputs["sequence_lengths"] = packed.lengths
    return inputs


def _to(array: Any, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
