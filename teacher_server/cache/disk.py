"""The disk's face for the event loop: look-ups and reads in one thread, writes behind in another.

What was computed waits in memory until it is written; where the disk is slower than the engine, or full, scores are
not kept, and nobody waits for it. A value that does not hold is dropped, and asked of the engine again. It knows no
request.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import sqlite3
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from protos.scores import Scores
from teacher_server.cache.database import Database, is_damage
from teacher_server.cache.keys import Key
from teacher_server.cache.packing import pack, unpack

log = logging.getLogger(__name__)
Result = TypeVar("Result")

WAITING_BYTES = 256 << 20
"""Bytes of scores that may wait to be written."""
BATCH_BYTES = 16 << 20
"""Bytes of scores that are written at a time, or read for one call."""
FAILURES = (OSError, sqlite3.Error)


@dataclass
class DiskCounts:
    """What became of scores: `not_kept` where the disk was too slow or failed, `evicted` where it was full."""

    written: int = 0
    read: int = 0
    damaged: int = 0
    evicted: int = 0
    not_kept: int = 0


class DiskTier:
    """Scores on the disk; `open` before anything else. All methods run on one event loop."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder, self._max_bytes = folder, max_bytes
        self.counts = DiskCounts()
        self.nbytes = 0
        """Bytes of the file that hold something, as of the last write."""
        self._database: Database | None = None
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="cache-reader")
        self._writers = ThreadPoolExecutor(1, thread_name_prefix="cache-writer")
        self._waiting: dict[Key, Scores] = {}
        self._waiting_bytes = 0
        self._used: set[Key] = set()
        self._writing: asyncio.Task[None] | None = None
        self._mending: asyncio.Task[None] | None = None
        self._failing = False

    async def open(self, fingerprint: str) -> None:
        """Opens the file of one teacher, making it where there is none; OSError where the folder cannot be used."""
        self._database = await self._in(self._writers, lambda: Database(self._folder, fingerprint, self._max_bytes))
        self.nbytes = await self._in(self._writers, lambda: self._open().used_bytes)

    async def known(self, keys: Collection[Key]) -> set[Key]:
        """Those of `keys` that can be read; nothing where the disk fails."""
        waiting = {key for key in keys if key in self._waiting}
        asked = [key for key in keys if key not in waiting]
        return waiting | (await self._look(lambda: self._open().known(asked)) or set())

    async def read(self, keys: Collection[Key]) -> dict[Key, Scores]:
        """The scores of those of `keys` that are there and hold."""
        found = {key: self._waiting[key] for key in keys if key in self._waiting}
        asked = [key for key in keys if key not in found]

        def work() -> dict[Key, Scores | None]:
            return {key: unpack(key, value) for key, value in self._open().read(asked).items()}

        read = await self._look(work) or {}
        damaged = [key for key, scores in read.items() if scores is None]
        found |= {key: scores for key, scores in read.items() if scores is not None}
        self.counts.read += len(read) - len(damaged)
        self._used.update(key for key in read if key in found)
        if damaged:
            self.counts.damaged += len(damaged)
            log.warning("%d scores on the disk were damaged; they are dropped and computed again", len(damaged))
            await self._try(lambda: self._open().drop(damaged))
        return found

    def put(self, key: Key, scores: Scores) -> None:
        """Keeps scores soon; they are forgotten where too many wait."""
        if key in self._waiting:
            return
        if self._waiting_bytes + scores.nbytes > WAITING_BYTES:
            self.counts.not_kept += 1
            return
        self._waiting[key] = scores
        self._waiting_bytes += scores.nbytes
        if self._writing is None or self._writing.done():
            self._writing = asyncio.get_running_loop().create_task(self._write())

    async def flush(self) -> None:
        """Returns when all that was put is written, or given up."""
        while self._writing is not None and not self._writing.done():
            await asyncio.wait({self._writing})

    async def close(self) -> None:
        """Writes what waits and ends."""
        await self.flush()
        if self._mending is not None:
            await self._mending
        if self._database is not None:
            await self._try(lambda: self._open().write({}, self._used))
            await self._in(self._writers, self._database.close)
        self._readers.shutdown()
        self._writers.shutdown()

    async def _write(self) -> None:
        while self._waiting:
            batch, size = {}, 0
            for key, scores in self._waiting.items():
                batch[key] = scores
                size += scores.nbytes
                if size >= BATCH_BYTES:
                    break
            await self._write_batch(batch)
            for key, scores in batch.items():
                del self._waiting[key]
                self._waiting_bytes -= scores.nbytes

    async def _write_batch(self, batch: dict[Key, Scores]) -> None:
        used, self._used = self._used, set()

        def work() -> tuple[int, int]:
            database = self._open()
            dropped = database.write({key: pack(key, scores) for key, scores in batch.items()}, used)
            return dropped, database.used_bytes

        done = await self._try(work)
        if done is None:
            self.counts.not_kept += len(batch)
        else:
            self.counts.written += len(batch)
            self.counts.evicted += done[0]
            self.nbytes = done[1]

    async def _look(self, work: Callable[[], Result]) -> Result | None:
        """What `work` gives in the readers' thread; None where the disk fails. A damaged file is mended meanwhile."""
        try:
            return await self._in(self._readers, work)
        except FAILURES as error:
            if not is_damage(error):
                self._failed(error)
            elif self._mending is None or self._mending.done():
                mend = functools.partial(self._open().mend, error)
                self._mending = asyncio.get_running_loop().create_task(self._try(mend))
            return None

    async def _try(self, work: Callable[[], Result]) -> Result | None:
        """What `work` gives in the writers' thread; None where the disk fails."""
        try:
            result = await self._in(self._writers, work)
        except FAILURES as error:
            self._failed(error)
            return None
        self._failing = False
        return result

    async def _in(self, threads: ThreadPoolExecutor, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(threads, work)

    def _open(self) -> Database:
        assert self._database is not None, "the disk tier was not opened"
        return self._database

    def _failed(self, error: Exception) -> None:
        """Says once that the disk fails, until it works again."""
        if not self._failing:
            log.error("the score cache's disk fails, scores are computed or kept in memory alone: %s", error)
        self._failing = True
