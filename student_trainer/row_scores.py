"""Scores of rows, each from the teacher that it belongs to: asked for ahead, and kept unless they are too large.

One store for each teacher (score_store.py); this only sorts rows to them and puts the answers back in order. Knows no
loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from protos.scores import Scores, ScoreSpec

from .batches import Row
from .score_store import AskedScores, ScoreStore, Wait, open_store
from .teachers import Teachers


class RowScores:
    """The scores of `spec` from all teachers. With a `folder` they are kept there, except hidden states."""

    def __init__(self, teachers: Teachers, spec: ScoreSpec, folder: Path | None = None, rank: int = 0) -> None:
        self._teachers, self.spec = teachers, spec
        self._stores: dict[str, ScoreStore | AskedScores] = {}
        for teacher in teachers.all:
            fingerprint = teacher.info.fingerprint
            if fingerprint in self._stores:  # the same model behind two routes has the same scores
                continue
            self._stores[fingerprint] = (
                AskedScores(teacher.client, spec)
                if folder is None
                else open_store(teacher.client, fingerprint, spec, folder, rank)
            )

    @property
    def asked(self) -> int:
        """The number of sequences that went to the teachers."""
        return sum(store.asked for store in self._stores.values())

    def request(self, rows: Sequence[Row]) -> Wait:
        """Asks for what is neither known nor under way, at once; the result waits and gives the scores of `rows`."""
        groups: dict[str, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(self._teachers.of(row.mode, row.domain).info.fingerprint, []).append(i)
        waits = [(places, self._stores[f].request([rows[i].tokens() for i in places])) for f, places in groups.items()]

        def wait() -> list[Scores]:
            found: dict[int, Scores] = {}
            for places, wait_for in waits:
                found.update(zip(places, wait_for(), strict=True))
            return [found[i] for i in range(len(rows))]

        return wait

    def keep(self) -> None:
        """Keeps the scores that have arrived and were not waited for yet."""
        for store in self._stores.values():
            store.keep()

    def close(self) -> None:
        """Keeps the scores that have arrived."""
        for store in self._stores.values():
            store.close()
