"""A budget for the think block: when it is spent, the closing tag is put in the model's mouth. Knows ids only."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from protos.scores import Ids

CLOSING_TEXT = "\n</think>\n\n"


@dataclass(frozen=True)
class ThinkTags:
    """Ids of the tags, and `closing`, the tokens that end a block (the closing tag among them, once)."""

    open_id: int
    close_id: int
    closing: tuple[int, ...]

    @staticmethod
    def of(think_ids: tuple[int, ...], closing: Ids) -> ThinkTags | None:
        """The tags of a tokenizer, whose tokens of CLOSING_TEXT are `closing`; None where a tag is not one token."""
        ids = tuple(int(i) for i in closing)
        return ThinkTags(*think_ids, ids) if len(think_ids) == 2 and ids.count(think_ids[1]) == 1 else None


@dataclass
class ThinkBudget:
    """Follows one completion; at most `budget` tokens stand between the opening tag and what closes it.

    Forced tokens count towards max_tokens like any other, and their log-probabilities are the model's own.
    """

    tags: ThinkTags
    budget: int
    inside: bool
    used: int = 0
    _queue: list[int] = field(default_factory=list)

    @staticmethod
    def after(prompt_ids: Ids, tags: ThinkTags, budget: int) -> ThinkBudget:
        """A budget for what follows int32[P]; the block is open where the prompt's last tag opens one."""
        found = prompt_ids[np.isin(prompt_ids, (tags.open_id, tags.close_id))]
        return ThinkBudget(tags, budget, inside=bool(len(found)) and int(found[-1]) == tags.open_id)

    def forced(self) -> int:
        """The id that must come next, or -1 for any."""
        if not self._queue and self.inside and self.used >= self.budget:
            self._queue = list(self.tags.closing)
        return self._queue[0] if self._queue else -1

    def observe(self, token: int) -> None:
        """Takes note of the token that was drawn or forced."""
        if self._queue:
            self._queue.pop(0)
        if token == self.tags.close_id:
            self.inside = False
        elif token == self.tags.open_id:
            self.inside, self.used = True, 0
        elif self.inside:
            self.used += 1
