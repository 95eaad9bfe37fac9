"""The processes of one `torchrun`: who I am, waiting for one another, small objects between them.

Without torchrun every function is the one-process case. Knows torch.distributed, nothing of models, data or the
teacher. Objects and waits go over a gloo group of their own with a long timeout, because rank 0 may collect a
teacher's responses for hours while the others wait, which must not widen the timeout of the collectives of training.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long a process waits for rank 0's work before it gives up."""


def start() -> None:
    """Joins the process group that torchrun's or accelerate's environment describes; nothing where there is none."""
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")


def stop() -> None:
    """Leaves the process group, if there is one."""
    if dist.is_initialized():
        _patient_group.cache_clear()
        dist.destroy_process_group()


def rank() -> int:
    """This process's number; 0 alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


@cache
def _patient_group() -> Any:
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def gather(value: T) -> list[T]:
    """`value` of every process, in the order of ranks, on every process."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value, group=_patient_group())
    return values


def barrier() -> None:
    """Waits until every process is here."""
    gather(None)


def on_main(work: Callable[[], T]) -> T:
    """Rank 0 does `work` while the others wait; all get its result, and all raise what it raised."""
    if world() == 1:
        return work()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = work()
        except Exception as error:  # noqa: BLE001 - carried to every process and raised there
            box[1] = error
    dist.broadcast_object_list(box, src=0, group=_patient_group())
    if box[1] is not None:
        raise box[1]
    result: T = box[0]
    return result
