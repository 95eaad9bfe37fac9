"""Which examples each optimizer step of this process trains on: a function of the step's number and the seed.

So steps can be looked at before their turn, over the end of an epoch too, and a run that goes on finds the same ones.
It is the order that the Trainer's own data loader gives. Knows no example and no Trainer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from .batches import GroupedSampler, cut


class Step(NamedTuple):
    """An optimizer step: its number (0 is the first), its epoch, and the examples of each of its micro-batches."""

    number: int
    epoch: int
    micro_batches: tuple[tuple[int, ...], ...]


class Schedule:
    """The steps of process `rank` of `world`, each of `accumulation` micro-batches of `batch_size` examples.

    `lengths` int64[examples] are tokens, by which a global batch is sorted (see GroupedSampler), and each process's
    share of it cut into micro-batches, as padded or `packed` rows want it. The last step of an epoch has what is left.
    """

    def __init__(
        self,
        lengths: npt.ArrayLike,
        *,
        batch_size: int,
        accumulation: int,
        rank: int,
        world: int,
        seed: int,
        packed: bool,
    ) -> None:
        self._lengths, self._group, self._seed = np.asarray(lengths, np.int64), batch_size * accumulation * world, seed
        self._order = self.sampler()
        self._batches: Any = BatchSampler(self._order, batch_size, drop_last=False)
        if world > 1:
            self._batches = BatchSamplerShard(self._batches, world, rank)
        self._accumulation, self._packed = accumulation, packed
        self._epochs: dict[int, list[list[int]]] = {}

    def sampler(self) -> GroupedSampler:
        """What gives a data loader the same order."""
        return GroupedSampler(self._lengths, self._group, self._seed)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return -(-len(self._batches) // self._accumulation)

    def step(self, number: int) -> Step:
        """Step `number`; epochs before it are forgotten."""
        epoch, place = divmod(number, self.steps_per_epoch)
        first = place * self._accumulation
        equal = self._epoch(epoch)[first : first + self._accumulation]
        rows = [i for batch in equal for i in batch]
        parts = cut(self._lengths[rows].tolist(), len(equal), packed=self._packed)
        return Step(number, epoch, tuple(tuple(rows[place] for place in part) for part in parts))

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            self._order.set_epoch(epoch)
            self._epochs[epoch] = list(self._batches)
            for old in [e for e in self._epochs if e < epoch - 1]:
                del self._epochs[old]
        return self._epochs[epoch]
