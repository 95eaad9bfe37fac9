"""What a stage trains on, as the Trainer sees it: optimizer steps that are announced early and taken when their turn
comes.

Knows no teacher, no model and no Trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from protos.scores import Scores

from .batches import Row
from .losses import Targets
from .schedule import Step


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """Sequences that train in one forward pass.

    `scores` waits for the teacher and gives the score of each row; `targets` makes of them the targets of the
    completion tokens, in the order of `rows`. `rollout_logprobs` float32[N] are the sampler's, where the loss weighs by
    them, and `begins` bool[N] the tokens whose weight as a prefix is 1; None: the first of each row.
    """

    rows: Sequence[Row]
    scores: Callable[[], Sequence[Scores]]
    targets: Callable[[Sequence[Scores]], Targets]
    rollout_logprobs: torch.Tensor | None = None
    begins: torch.Tensor | None = None


class Feed(Protocol):
    """What a stage trains on. Indices are those of the stage's examples, in 0..len-1."""

    @property
    def ahead(self) -> int:
        """Optimizer steps that are announced before the present one trains."""
        ...

    def __len__(self) -> int: ...

    def lengths(self) -> Sequence[int]:
        """Tokens of each example, by which a global batch is sorted into micro-batches."""
        ...

    def announce(self, step: Step) -> None:
        """A step that will be taken: whatever is asked of the teacher for it is asked now. Each once, in order."""
        ...

    def take(self, step: Step) -> list[MicroBatch]:
        """The micro-batches of a step that was announced, as many as it has; earlier steps are done with."""
        ...

    def save(self, folder: Path, step: int) -> None:
        """Writes to a checkpoint what this process needs to go on with step `step`, after as many that are done."""
        ...

    def restore(self, folder: Path) -> None:
        """Takes up what `save` wrote, where it did; before anything is announced."""
        ...
