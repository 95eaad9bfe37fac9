"""Scores that are known already: a bounded LRU, and the computations in flight that equal requests join.

A score is a pure function of the key, so entries never go stale. It knows no queue, no engine and no client.
"""

from __future__ import annotations

import asyncio
import hashlib
import struct
from collections import OrderedDict
from collections.abc import Coroutine
from typing import Any

from protos.scores import Scores, ScoreSpec, Sequence
from teacher_server.scheduling import Unit

Key = bytes


def score_key(fingerprint: str, sequence: Sequence, spec: ScoreSpec) -> Key:
    """SHA-256 over all that a score depends on; the fields are resolved first, so that equal wants are equal keys."""
    fields = ",".join(sorted(field.value for field in spec.fields(sequence.candidates)))
    head = (
        f"{fingerprint}\0{fields}\0{len(sequence.token_ids)}\0{sequence.score_start}\0{sequence.candidates}\0"
        f"{spec.top_k}\0"
    )
    digest = hashlib.sha256(head.encode())
    digest.update(struct.pack(f"<I{len(spec.temperatures)}d", len(spec.temperatures), *spec.temperatures))
    digest.update(sequence.token_ids.data)
    if sequence.candidate_ids is not None:
        digest.update(sequence.candidate_ids.data)
    return digest.digest()


class ScoreCache:
    """Least recently used scores, at most `max_bytes` of arrays; 0 keeps nothing."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._entries: OrderedDict[Key, Scores] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Scores | None:
        """The scores under `key`, which become the most recently used."""
        scores = self._entries.get(key)
        if scores is not None:
            self._entries.move_to_end(key)
        return scores

    def put(self, key: Key, scores: Scores) -> None:
        """Keeps scores, and drops the least recently used until all fit; what alone is too large is not kept."""
        if scores.nbytes > self.max_bytes:
            return
        old = self._entries.pop(key, None)
        if old is not None:
            self.nbytes -= old.nbytes
        # An array that is a view would hold the whole batch that it came from.
        owned = Scores(**{name: a if a.flags.owndata else a.copy() for name, a in scores.arrays().items()})
        self._entries[key] = owned
        self.nbytes += owned.nbytes
        while self.nbytes > self.max_bytes:
            self.nbytes -= self._entries.popitem(last=False)[1].nbytes


class Flight:
    """One computation with the number of those who wait for it."""

    def __init__(self, task: asyncio.Task[Scores]) -> None:
        self.task = task
        self.waiters = 0
        self.unit: Unit | None = None
        """Its place in the queue, which those who join it may claim too."""


class Flights:
    """Computations in flight by key; the last waiter that leaves cancels the computation, others never do."""

    def __init__(self) -> None:
        self._by_key: dict[Key, Flight] = {}

    def __len__(self) -> int:
        return len(self._by_key)

    def __contains__(self, key: Key) -> bool:
        """Whether an equal request can join; a flight that everybody has left is being cancelled."""
        flight = self._by_key.get(key)
        return flight is not None and flight.waiters > 0 and not flight.task.done()

    def start(self, key: Key, work: Coroutine[Any, Any, Scores]) -> Flight:
        """A new flight with its starter as the first waiter."""
        flight = Flight(asyncio.get_running_loop().create_task(work))
        flight.waiters = 1
        self._by_key[key] = flight
        flight.task.add_done_callback(lambda _: self._landed(key, flight))
        return flight

    def join(self, key: Key) -> Flight:
        """The flight under `key`, with one waiter more."""
        flight = self._by_key[key]
        flight.waiters += 1
        return flight

    def leave(self, flight: Flight) -> None:
        """Takes a waiter away."""
        flight.waiters -= 1
        if flight.waiters == 0 and not flight.task.done():
            flight.task.cancel()

    def _landed(self, key: Key, flight: Flight) -> None:
        if self._by_key.get(key) is flight:
            del self._by_key[key]
        if not flight.task.cancelled():
            flight.task.exception()  # marks it as seen where every waiter has left
