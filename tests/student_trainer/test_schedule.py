"""Which examples a step has: the data loader's, each once an epoch, ahead of time and on every process."""

from __future__ import annotations

from itertools import chain, islice
from typing import Any

import numpy as np
import pytest
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader

from student_trainer.schedule import Schedule

LENGTHS = np.random.default_rng(0).integers(5, 90, 37).tolist()


def schedule(rank: int = 0, world: int = 1, packed: bool = False) -> Schedule:
    return Schedule(LENGTHS, batch_size=3, accumulation=2, rank=rank, world=world, seed=5, packed=packed)


def rows(step: Any) -> list[int]:
    return sorted(chain.from_iterable(step.micro_batches))


@pytest.mark.parametrize("world", [1, 2])
def test_a_step_has_the_examples_of_the_data_loader(world: int) -> None:
    for rank in range(world):
        own = schedule(rank, world)
        sampler = own.sampler()
        batches = BatchSampler(sampler, 3, drop_last=False)
        loader = DataLoader(list(range(len(LENGTHS))), batch_sampler=batches, collate_fn=list)  # type: ignore[arg-type]
        loader = prepare_data_loader(loader, num_processes=world, process_index=rank, put_on_device=False)
        for epoch in range(2):
            sampler.set_epoch(epoch)
            given = iter(loader)
            for place in range(own.steps_per_epoch):
                step = own.step(epoch * own.steps_per_epoch + place)
                assert (step.number, step.epoch) == (epoch * own.steps_per_epoch + place, epoch)
                batch = list(islice(given, 2))
                assert len(batch) == len(step.micro_batches)
                assert rows(step) == sorted(chain.from_iterable(batch))
            assert next(given, None) is None


@pytest.mark.parametrize("packed", [False, True])
def test_an_epoch_has_every_example_once(packed: bool) -> None:
    own = schedule(packed=packed)
    assert sorted(chain.from_iterable(rows(own.step(n)) for n in range(own.steps_per_epoch))) == list(range(37))


def test_steps_may_be_looked_at_ahead_and_again() -> None:
    own, again = schedule(), schedule()
    size = own.steps_per_epoch
    ahead = [own.step(n) for n in range(3 * size)]
    assert [again.step(n) for n in reversed(range(2 * size, 3 * size))] == ahead[: 2 * size - 1 : -1]
    assert own.step(2 * size - 1) == ahead[2 * size - 1]
    assert rows(ahead[0]) != rows(ahead[size])
