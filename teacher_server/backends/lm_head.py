"""The LM head of a transformers model as the contract's Head, where hidden states and head are all there is to logits.

Knows tensors and modules, no queue and no request. Legend: V real vocabulary, R rows, H hidden size.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from protos.head import Head
from protos.scores import BITS
from teacher_server.backends.bits import dtype_name, to_bits
from teacher_server.backends.features import Features
from teacher_server.backends.transformers_model import LoadedModel


@dataclass(frozen=True, eq=False)
class LmHead:
    """`weight` [V,H] and `bias` [V] or None as the model multiplies them; `hidden_dtype` is that of hidden states."""

    weight: Tensor
    bias: Tensor | None
    hidden_dtype: str

    @property
    def hidden_size(self) -> int:
        """H."""
        return int(self.weight.shape[1])

    async def parts(self, rows: int) -> AsyncIterator[Head]:
        """Parts of `rows` rows; copying from a GPU waits in a thread."""
        for first in range(0, len(self.weight), rows):
            yield await asyncio.to_thread(self._part, first, first + rows)

    def _part(self, first: int, last: int) -> Head:
        weight = self.weight[first:last]
        bias = None if self.bias is None else self.bias[first:last].float().cpu().numpy()
        after = max(0, len(self.weight) - last)
        return Head(to_bits(weight), dtype_name(weight.dtype), bias, first, after)


def offered(loaded: LoadedModel, features: Features, vocab_size: int) -> LmHead | None:
    """The head, where `features` found that logits are exactly head @ state (+ bias); else None.

    None also for a head that is no plain Linear of a dtype that travels (quantised, or swapped out), and for hidden
    states that the head would round before it multiplies.
    """
    head: Any = loaded.model.get_output_embeddings()
    if features.kind != "head" or type(head) is not nn.Linear or head.weight.is_meta:
        return None
    with torch.inference_mode():
        hidden = features.run(torch.zeros(1, 2, dtype=torch.long, device=loaded.device)).dtype
    weight = head.weight.detach()
    names = {dtype_name(hidden), dtype_name(weight.dtype)}
    if not names <= BITS.keys() or torch.promote_types(hidden, weight.dtype) != weight.dtype:
        return None
    bias = None if head.bias is None else head.bias.detach()[:vocab_size]
    return LmHead(weight[:vocab_size], bias, dtype_name(hidden))
