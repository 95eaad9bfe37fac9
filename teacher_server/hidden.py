"""Memory for hidden states: how many bytes of them the answers of all open calls may take at a time.

They are a thousand times larger than log-probabilities, and a finished sequence stays in memory until its client has
read it. It knows requests and the teacher's description, no engine and no transport. Legend: T scored positions, H
hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from protos.errors import Overloaded, TooLarge
from protos.head import itemsize
from protos.scores import Field, ScoreRequest, TeacherInfo

RETRY_S = 1.0
"""Seconds after which a client asks again while others' hidden states fill the memory."""


class Hold:
    """What one call reserved, by the index of the sequence; a call without hidden states holds nothing."""

    def __init__(self, budget: HiddenBudget, sizes: dict[int, int]) -> None:
        self._budget = budget
        self._sizes = sizes
        budget.held += sum(sizes.values())

    def release(self, index: int) -> None:
        """Gives back what a sequence took, once its client has read it; doing it twice is harmless."""
        self._budget.held -= self._sizes.pop(index, 0)

    def release_all(self) -> None:
        """Gives back the rest."""
        self._budget.held -= sum(self._sizes.values())
        self._sizes.clear()


class HiddenBudget:
    """At most `max_bytes` of hidden states reserved at a time; `held` are."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.held = 0

    @contextmanager
    def hold(self, request: ScoreRequest, info: TeacherInfo) -> Iterator[Hold]:
        """Reserves T * H numbers for each sequence that wants them, until released or left.

        TooLarge where the call alone is over the limit, Overloaded where it does not fit beside the others.
        """
        sizes: dict[int, int] = {}
        if Field.HIDDEN_STATES in request.spec.want:
            row = info.hidden_size * itemsize(info.hidden_dtype)
            sizes = {index: sequence.positions * row for index, sequence in enumerate(request.sequences)}
            self._check(sum(sizes.values()), sum(s.positions for s in request.sequences), row)
        hold = Hold(self, sizes)
        try:
            yield hold
        finally:
            hold.release_all()

    def _check(self, size: int, positions: int, row: int) -> None:
        if size > self.max_bytes:
            raise TooLarge(
                f"the hidden states of {positions} positions, {row} bytes each, take {size} bytes, this server holds "
                f"{self.max_bytes}; split the call, or raise hidden_mib there"
            )
        if self.held + size > self.max_bytes:
            raise Overloaded(
                f"hidden states of open calls take {self.held} of {self.max_bytes} bytes, {size} more do not fit now; "
                "retry later",
                retry_after_s=RETRY_S,
            )
