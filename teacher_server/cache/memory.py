"""Scores that are kept in memory: a bounded LRU. It knows no disk, no queue and no client."""

from __future__ import annotations

from collections import OrderedDict

from protos.scores import Scores
from teacher_server.cache.keys import Key


class ScoreCache:
    """Least recently used scores, at most `max_bytes` of arrays; 0 keeps nothing."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._entries: OrderedDict[Key, Scores] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Key) -> bool:
        return key in self._entries

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
