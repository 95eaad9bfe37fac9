"""Memory for hidden states: how many bytes of them the answers of all open calls may take at a time.

They are a thousand times larger than log-probabilities, and a finished sequence stays in memory until its client has
read it. It knows requests and the teacher's description, no engine and no transport. Legend: T scored positions, H
hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from protos.errors import Overloaded, TooLarge
from protos.head import itemsize
from protos.scores import Field, ScoreRequest, TeacherInfo
from teacher_server.auth import Caller
from teacher_server.sharing import Pool


class Hold:
    """What one call reserved, by the index of the sequence; a call without hidden states holds nothing."""

    def __init__(self, pool: Pool, client: str, sizes: dict[int, int]) -> None:
        self._pool = pool
        self._client = client
        self._sizes = sizes
        if sizes:
            pool.take(client, sum(sizes.values()))

    def release(self, index: int) -> None:
        """Gives back what a sequence took, once its client has read it; doing it twice is harmless."""
        size = self._sizes.pop(index, 0)
        if size:
            self._pool.give(self._client, size, finished=True)

    def release_all(self) -> None:
        """Gives back the rest."""
        if self._sizes:
            self._pool.give(self._client, sum(self._sizes.values()), finished=False)
        self._sizes.clear()


class HiddenBudget:
    """At most `max_bytes` of hidden states reserved at a time, shared between clients as `sharing.Pool` says."""

    def __init__(self, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._pool = Pool(max_bytes, clock)

    @property
    def held(self) -> int:
        """Bytes reserved now."""
        return self._pool.held

    @contextmanager
    def hold(self, request: ScoreRequest, info: TeacherInfo, caller: Caller) -> Iterator[Hold]:
        """Reserves T * H numbers for each sequence that wants them, until released or left.

        TooLarge where the call alone is over the limit, Overloaded where it does not fit beside the others; its delay
        is the time in which, at the rate of late, clients read as much.
        """
        sizes: dict[int, int] = {}
        if Field.HIDDEN_STATES in request.spec.want:
            row = info.hidden_size * itemsize(info.hidden_dtype)
            sizes = {index: sequence.positions * row for index, sequence in enumerate(request.sequences)}
            self._check(sum(sizes.values()), sum(s.positions for s in request.sequences), row, caller)
        hold = Hold(self._pool, caller.name, sizes)
        try:
            yield hold
        finally:
            hold.release_all()

    def _check(self, size: int, positions: int, row: int, caller: Caller) -> None:
        limit = self._pool.limit
        if size > limit:
            raise TooLarge(
                f"the hidden states of {positions} positions, {row} bytes each, take {size} bytes, this server holds "
                f"{limit}; split the call, or raise hidden_mib there"
            )
        excess = self._pool.excess(caller.name, caller.weight, size)
        if excess:
            raise Overloaded(
                f"hidden states of open calls take {self.held} of {limit} bytes, "
                f"{self._pool.by_client.get(caller.name, 0)} of them this client's; {size} more do not fit now, retry "
                "later",
                retry_after_s=self._pool.delay(excess),
            )
