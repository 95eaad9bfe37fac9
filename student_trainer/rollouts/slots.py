"""Keys and values of rows of unlike lengths, each in a slot of its own, in the cache interface of transformers.

A row's positions stand at the beginning of its slot, so a new row is put where another one ended and none is moved or
padded. It knows tensors, not what a row means. Legend: S slots, H heads, L positions, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

_ROOM = 64


class _Layer(DynamicLayer):  # type: ignore[misc]
    """One layer: two buffers [S, H, capacity, D], of which a step uses the first rows and positions.

    It has S = `slots` slots for at most `most` positions.
    """

    def __init__(self, slots: int, most: int) -> None:
        super().__init__()
        self.slots, self.most = slots, most
        self.buffers: list[Tensor] = []
        self.at: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))
        self.length = 0

    def prepare(self, rows: Tensor, positions: Tensor, length: int) -> None:
        """The next `update` writes one position of each of int64[B] rows and shows `length` positions of them."""
        self._reserve(self.buffers, length)
        self.at, self.length = (rows, positions), length

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Puts [B, H, 1, D] in place; [B, H, length, D] of the first B slots.

        Under autocast a layer's dtype may differ between reading a prompt and a step; what is held keeps the first one.
        """
        rows, positions = self.at
        for buffer, new in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[rows, :, positions] = new[:, :, 0].to(buffer.dtype)
        keys, values = (buffer[: len(rows), :, : self.length] for buffer in self.buffers)
        return keys, values

    def get_seq_length(self) -> int:
        """Positions before the step's own, for the model's mask."""
        return self.length - 1

    def put(self, slots: Tensor, read: Any, source: Tensor) -> None:
        """Takes the layer `read` of prompts over: position int64[B, L] of each of them into int64[B] slots."""
        self._reserve((read.keys, read.values), source.shape[1])
        rows, at = (torch.arange(n, device=slots.device) for n in source.shape)
        for buffer, new in zip(self.buffers, (read.keys, read.values), strict=True):
            buffer[slots[:, None], :, at] = new[rows[:, None], :, source].to(buffer.dtype)
        read.keys = read.values = None

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copies `length` positions of int64[B] slots to others."""
        for buffer in self.buffers:
            buffer[targets, :, :length] = buffer[sources, :, :length]

    def _reserve(self, like: Sequence[Tensor], length: int) -> None:
        held = self.buffers[0].shape[2] if self.buffers else 0
        if held >= length:
            return
        room = min(self.most, length + max(_ROOM, length // 4))
        for i, new in enumerate(like):
            buffer = new.new_zeros(self.slots, new.shape[1], room, new.shape[3])
            if held:
                buffer[:, :, :held] = self.buffers[i]
                self.buffers[i] = buffer
            else:
                self.buffers.append(buffer)


class SlotCache(DynamicCache):  # type: ignore[misc]
    """A cache of `slots` rows with at most `most` positions each."""

    def __init__(self, layers: int, slots: int, most: int) -> None:
        super().__init__()
        self.layer_class_to_replicate = None
        self.layers = [_Layer(slots, most) for _ in range(layers)]

    def prepare(self, rows: Tensor, positions: Tensor, length: int) -> None:
        """The next forward pass has one token of the first slots int64[B], at int64[B] positions below `length`."""
        for layer in self.layers:
            layer.prepare(rows, positions, length)

    def put(self, slots: Tensor, prompts: DynamicCache, pads: Tensor) -> None:
        """Takes over the keys and values of prompts, padded on the left by int64[B], into int64[B] slots."""
        length = prompts.layers[0].keys.shape[2]
        # Beyond a prompt's end anything may stand: it is hidden until it is replaced.
        source = (torch.arange(length, device=slots.device) + pads[:, None]).clamp(max=length - 1)
        for layer, read in zip(self.layers, prompts.layers, strict=True):
            layer.put(slots, read, source)

    def move(self, sources: Tensor, targets: Tensor, length: int) -> None:
        """Copies `length` positions of int64[B] slots to others."""
        for layer in self.layers:
            layer.move(sources, targets, length)


def fits(config: Any) -> bool:
    """Whether every layer of a model is attention over its whole past, so that slots can be refilled."""
    if getattr(config, "is_encoder_decoder", False):
        return False
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
