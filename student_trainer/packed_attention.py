"""Attention inside the sequences of a packed row: torch's own, without any package beside it.

`enable` puts it in the place of transformers' `sdpa`, which it still is wherever no borders are given (padded batches,
generation). With borders it is torch's variable-length FlashAttention kernel in bfloat16 or float16 on a GPU, and
elsewhere torch's fused attention of one sequence after the other; neither ever holds a mask of the whole row, and both
give each sequence what it gets alone. Knows no row, batch or loss.

Legend: B sequences, L tokens of all of them together, A heads of queries, G of keys and values, D size of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

_GROUPED: dict[str, Any] = (
    {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
)
"""torch 2.11 takes fewer heads of keys than of queries unasked."""


def enable() -> None:
    """Makes `sdpa` of every transformers model in this process understand packed rows."""
    AttentionInterface.register("sdpa", packed_attention)


def borders(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What attention needs to know of a packed row of sequences of these lengths, in transformers' names.

    `cu_seq_lens_q` and `cu_seq_lens_k` int32[B+1] are where sequences begin and end, on `device`; the rest stays on
    the host, so that no layer waits for the GPU.
    """
    ends = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    ends[1:] = torch.tensor(lengths).cumsum(0)
    ends, longest = ends.to(device), max(lengths)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def has_kernel(query: Tensor, dropout: float) -> bool:
    """Whether the kernel takes such queries, backward pass included: bfloat16 or float16, an NVIDIA GPU from Ampere on
    (or AMD's), no dropout, and heads whose size is a multiple of 8, up to 256 on an A100 or H100 and 192 elsewhere.
    """
    size = query.shape[-1]
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16) or dropout > 0 or size % 8:
        return False
    if torch.version.hip is not None:
        return size <= 192
    capability = torch.cuda.get_device_capability(query.device)
    return capability >= (8, 0) and size <= (256 if capability in ((8, 0), (9, 0)) else 192)


def packed_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sequence_lengths: tuple[int, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' `sdpa`, or where `sequence_lengths` names the B sequences of the row, causal attention inside
    each of them: query [1,A,L,D], key and value [1,G,L,D] to [1,L,A,D]. The mask is not read then.
    """
    if sequence_lengths is None:
        given = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kwargs}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **given)  # type: ignore[no-any-return]
    if kwargs.get("softcap") is not None:
        raise ValueError("packed rows need an attention without softcap; set training.packing=false")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if not has_kernel(query, dropout):
        return _one_by_one(module, (query, key, value), sequence_lengths, dropout, scaling, sliding_window), None
    ends, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    # Only where no more is asked for is it a tensor alone.
    found: Any = varlen.varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scaling, window_size=window, **_GROUPED
    )
    return found[None], None


def _one_by_one(
    module: Any,
    inputs: tuple[Tensor, Tensor, Tensor],
    lengths: tuple[int, ...],
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    sequences = zip(*(x.split(lengths, 2) for x in inputs), strict=True)
    masks = (_window(n, sliding_window, inputs[0].device) for n in lengths)
    parts = [
        sdpa_attention_forward(module, *sequence, mask, dropout=dropout, scaling=scaling)[0]
        for sequence, mask in zip(sequences, masks, strict=True)
    ]
    return torch.cat(parts, 1)


def _window(length: int, size: int | None, device: torch.device) -> Tensor | None:
    """bool[1,1,n,n] of a sequence that is longer than its layer's window; None where plain causality is meant."""
    if size is None or length <= size:
        return None
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return ((back >= 0) & (back < size))[None, None]
