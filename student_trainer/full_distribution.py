"""The teacher's whole distribution in the trainer: its LM head on the student's device, its hidden states as tensors.

Between the client's bits (numpy) and the losses (torch); knows no loss and no Trainer. Legend: N positions, H hidden
size.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from protos.head import itemsize
from protos.scores import Bits, Scores, TeacherInfo

from . import distributed
from .config import Config
from .losses import Head
from .teacher_client import TeacherClient
from .teacher_client.heads import default_cache

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TeacherHead:
    """`head` on the student's device, over the real vocabulary, and the dtype of the hidden states that it takes."""

    head: Head
    hidden_dtype: str

    @property
    def vocab_size(self) -> int:
        """Number of logits: the real vocabulary."""
        return int(self.head.weight_VH.shape[0])

    def hidden(self, scores: Sequence[Scores]) -> torch.Tensor:
        """[N,H] of the scores' rows, one after the other, on the CPU; ValueError where a score has none."""
        parts = [s.hidden_states for s in scores if s.hidden_states is not None]
        if len(parts) < len(scores):
            raise ValueError("a score came without hidden states, which were asked for")
        return tensor(parts[0] if len(parts) == 1 else np.concatenate(parts), self.hidden_dtype)


def tensor(bits: Bits, dtype: str) -> torch.Tensor:
    """The numbers of a named dtype as a tensor that shares memory with `bits` where they may be written."""
    writable = bits if bits.flags.writeable else bits.copy()
    return torch.from_numpy(writable).view(getattr(torch, dtype))


def fetch(config: Config, client: TeacherClient, device: torch.device) -> TeacherHead:
    """The head of the client's teacher, from the cache folder or over the wire; rank 0 goes first."""
    info = client.teacher()
    named = config.teacher.cache_dir
    cache = default_cache() if named is None else Path(named).expanduser()
    log.info("%s; the head is kept in %s", needs(info), cache)

    def first() -> None:
        client.head(cache)

    distributed.on_main(first)
    found = client.head(cache)  # other machines than rank 0's fetch their own
    bias = None if found.bias is None else torch.from_numpy(np.array(found.bias)).to(device)
    weight = tensor(found.weight, found.dtype).to(device)
    return TeacherHead(Head(weight, bias, info.vocab_size), info.hidden_dtype)


def needs(info: TeacherInfo) -> str:
    """What the whole distribution of this teacher takes, in a line."""
    row = info.hidden_size * itemsize(info.hidden_dtype)
    head = info.vocab_size * row / 1e6
    return (
        f"full distribution: {row} bytes a token on the wire and in memory until it has trained, and about {head:.4g} "
        "MB for the teacher's LM head"
    )
