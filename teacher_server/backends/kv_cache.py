"""The key/value cache of a batch whose rows come and go.

transformers' own cache copies everything at each step and cannot take in rows; this one writes into room kept ahead,
drops rows, and joins with another. It knows tensors, no row's meaning. Shapes are [B, heads, L, width], left-padded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 64


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values as views of buffers with room for steps to come.

    It also serves sliding-window layers: all positions are kept and the model's own mask hides the old ones.
    """

    keys: Tensor
    values: Tensor
    _buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends [B, heads, new, width]; returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = 0 if self._buffers is None else int(self.keys.shape[-2])
        after = before + key_states.shape[-2]
        if self._buffers is None or self._buffers[0].shape[-2] < after:
            self._buffers = tuple(  # type: ignore[assignment]
                _resized(old if before else new, before, after + max(_ROOM, after // 8))
                for old, new in ((self.keys, key_states), (self.values, value_states))
            )
        keys, values = self._buffers  # type: ignore[misc]
        keys[:, :, before:after] = key_states
        values[:, :, before:after] = value_states
        self.keys, self.values = keys[:, :, :after], values[:, :, :after]
        return self.keys, self.values

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Takes [B, heads, L, width] as the whole content, without room."""
        self._buffers = (keys, values)
        self.keys, self.values = keys, values


def _resized(like: Tensor, keep: int, length: int) -> Tensor:
    out = like.new_empty(*like.shape[:2], length, like.shape[-1])
    if keep:
        out[:, :, :keep] = like[:, :, :keep]
    return out


def new_cache(config: Any) -> DynamicCache:
    """An empty cache for a model of that configuration."""
    cache = DynamicCache(config=config)
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    cache.layers = [GrowingLayer() if type(layer) in plain else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
    return cache


def joinable(cache: DynamicCache) -> bool:
    """Whether every layer is attention over the whole past, so that rows can be left-padded, dropped and joined."""
    return all(type(layer) is GrowingLayer for layer in cache.layers)


def select(cache: DynamicCache, rows: Tensor, skip: int = 0) -> None:
    """Keeps int64[rows] of the batch, in that order, repeats allowed, without the first `skip` positions."""
    for layer in cache.layers:
        here = rows.to(layer.keys.device)  # a model over several GPUs keeps each layer's part on its own
        layer.replace(layer.keys[here][:, :, skip:], layer.values[here][:, :, skip:])


def join(cache: DynamicCache, other: DynamicCache) -> int:
    """Appends the rows of `other`, left-padded to one length; returns that length."""
    length = 0
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        length = max(ours.keys.shape[-2], theirs.keys.shape[-2])
        pairs = ((ours.keys, theirs.keys), (ours.values, theirs.values))
        ours.replace(*(_stack(a, b, length) for a, b in pairs))
    return length


def _stack(first: Tensor, second: Tensor, length: int) -> Tensor:
    rows = first.shape[0]
    # Zeros, not garbage: padded positions are masked, and a masked NaN would still spread through 0 * NaN.
    out = torch.zeros(
        rows + second.shape[0], first.shape[1], length, first.shape[3], dtype=first.dtype, device=first.device
    )
    out[:rows, :, length - first.shape[-2] :] = first
    out[rows:, :, length - second.shape[-2] :] = second
    return out
