"""Counts the bytes of all tensors that are alive, and their largest sum: what a GPU's allocator tells, on a CPU.

It sees every tensor that an operation makes while it is on, backward passes included; not what a kernel takes inside
itself, nor tensors of before.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):  # type: ignore[misc]
    """A context in which bytes are counted: `held` now, `peak` at most since `reset`."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: dict[int, int] = {}

    def reset(self) -> None:
        """The largest sum starts anew from what is held now."""
        self.peak = self.held

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf.untyped_storage())
        return found

    def _add(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._known or storage.device.type == "meta":
            return
        self._known[key] = storage.nbytes()
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.held -= self._known.pop(key)
