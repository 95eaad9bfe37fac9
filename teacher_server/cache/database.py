"""Packed scores of one teacher in one SQLite file, at most so many bytes, least recently used ones dropped first.

The file is in WAL mode: what a killed process had committed is there, what it had not is not. A value is told by its
digest; one that does not hold is dropped alone. Where the file's own structure is damaged, whatever can still be read
moves to a new file. Several processes may use one file at a time; a network file system, which WAL does not work on, is
no place for it. It blocks, so it runs in threads; it knows no event loop.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import shutil
import sqlite3
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from teacher_server.cache.keys import Key
from teacher_server.cache.packing import key_of

log = logging.getLogger(__name__)

DAMAGE = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR}
"""What SQLite says of a damaged file; SQLITE_ERROR is a table that is gone."""
FILE, LOCK = "scores.sqlite", "in_use"
PAGE_BYTES = 16_384
"""SQLite's largest but two: values are much larger than its default of 4 KiB."""
WAIT_S = 10.0
"""Seconds that one process waits for another's transaction."""
SCHEMA = f"""
PRAGMA page_size = {PAGE_BYTES};
PRAGMA journal_mode = WAL;
PRAGMA synchronous = NORMAL;
PRAGMA journal_size_limit = {16 << 20};
CREATE TABLE IF NOT EXISTS scores (id INTEGER PRIMARY KEY, value BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS entries (key BLOB PRIMARY KEY, used INTEGER NOT NULL, id INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS by_use ON entries (used);
"""


class Database:
    """The scores of `fingerprint` in a folder of `root`; OSError where that cannot be used.

    `max_bytes` are for all of `root`: what other fingerprints left there is dropped first, unless a server uses it.
    `known` and `read` may be called in one thread, the others in another. Where one of the first meets a damaged file
    it raises what `is_damage` tells, and `mend` is to be called.
    """

    def __init__(self, root: Path, fingerprint: str, max_bytes: int) -> None:
        self._root, self._folder = root, root / fingerprint[:32]
        self._max_bytes = max_bytes
        self._lock_file: IO[bytes] | None = None
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._open()

    @property
    def file(self) -> Path:
        """The database's file."""
        return self._folder / FILE

    @property
    def used_bytes(self) -> int:
        """Bytes of the file's pages that hold something."""
        return self._pages(self._writer)

    def known(self, keys: Collection[Key]) -> set[Key]:
        """Those of `keys` that have an entry; whether its value holds is seen when it is read."""
        query = "SELECT 1 FROM entries WHERE key = ?"
        return {key for key in keys if self._reader.execute(query, (key,)).fetchone()}

    def read(self, keys: Iterable[Key]) -> dict[Key, bytes]:
        """The packed scores of those of `keys` that have an entry."""
        query = "SELECT value FROM scores WHERE id = (SELECT id FROM entries WHERE key = ?)"
        found = {}
        for key in keys:
            row = self._reader.execute(query, (key,)).fetchone()
            if row is not None:
                found[key] = row[0] if isinstance(row[0], bytes) else b""
        return found

    def write(self, values: dict[Key, bytes], used: Collection[Key] = ()) -> int:
        """Keeps values and marks `used` keys as recently used; how many others were dropped to make room."""
        dropped = 0
        with self._mended():
            incoming = sum(len(value) + PAGE_BYTES for value in values.values())
            if incoming > self._max_bytes:
                values = {}
            dropped = self._make_room(incoming if values else 0)
            with self._transaction():
                row = self._writer.execute("SELECT max(used) FROM entries").fetchone()
                now = (row[0] or 0) + 1
                self._writer.executemany("UPDATE entries SET used = ? WHERE key = ?", [(now, key) for key in used])
                for key, value in values.items():
                    if self._writer.execute("SELECT 1 FROM entries WHERE key = ?", (key,)).fetchone() is None:
                        number = self._writer.execute("INSERT INTO scores (value) VALUES (?)", (value,)).lastrowid
                        self._writer.execute("INSERT INTO entries VALUES (?, ?, ?)", (key, now, number))
        return dropped

    def drop(self, keys: Collection[Key]) -> None:
        """Forgets entries."""
        with self._mended(), self._transaction():
            for key in keys:
                self._forget(key)

    def close(self) -> None:
        """Ends all use of the file."""
        for connection in (self._reader, self._writer):
            with contextlib.suppress(sqlite3.Error):
                connection.close()
        if self._lock_file is not None:
            self._lock_file.close()

    def _open(self) -> None:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock_file = (self._folder / LOCK).open("ab")
        fcntl.flock(self._lock_file, fcntl.LOCK_SH)
        self._writer = _connect(self.file)
        self._reader = _connect(self.file)
        try:
            self._prepare()
        except sqlite3.Error as error:
            if not is_damage(error):
                raise OSError(f"cannot use {self.file}: {error}") from error
            self.mend(error)

    def _prepare(self) -> None:
        """Makes the tables, once another process that does so is done."""
        end = time.monotonic() + WAIT_S
        while True:
            try:
                self._writer.executescript(SCHEMA)
            except sqlite3.OperationalError as error:  # the change to WAL does not wait for others
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                    raise
                time.sleep(0.05)
            else:
                return

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
            raise
        self._writer.execute("COMMIT")

    def _pages(self, connection: sqlite3.Connection) -> int:
        (count,) = connection.execute("PRAGMA page_count").fetchone()
        (free,) = connection.execute("PRAGMA freelist_count").fetchone()
        return int((count - free) * PAGE_BYTES)

    def _make_room(self, incoming: int) -> int:
        """Drops other teachers' files, then the least recently used entries, until `incoming` bytes fit."""
        dropped = 0
        while (excess := self.used_bytes + incoming + _others(self._root, self._folder) - self._max_bytes) > 0:
            if _drop_oldest(self._root, self._folder):
                continue
            query = "SELECT e.key, length(s.value) FROM entries e JOIN scores s USING (id) ORDER BY e.used LIMIT 256"
            oldest = self._writer.execute(query).fetchall()
            if not oldest:
                break
            with self._transaction():
                for key, size in oldest:
                    self._forget(key)
                    dropped += 1
                    excess -= size
                    if excess <= 0:
                        break
        return dropped

    def _forget(self, key: Key) -> None:
        self._writer.execute("DELETE FROM scores WHERE id = (SELECT id FROM entries WHERE key = ?)", (key,))
        self._writer.execute("DELETE FROM entries WHERE key = ?", (key,))

    @contextmanager
    def _mended(self) -> Iterator[None]:
        """Ends what meets a damaged file, and mends that."""
        try:
            yield
        except sqlite3.Error as error:
            if not is_damage(error):
                raise
            self.mend(error)

    def mend(self, error: Exception) -> None:
        """Moves what can be read of a damaged file to a new one."""
        broken = self._folder.with_name(f"{self._folder.name}.broken")
        shutil.rmtree(broken, ignore_errors=True)
        self.close()
        self._folder.rename(broken)
        self._open()
        saved = 0
        for key, value in _readable(broken / FILE):
            saved += 1
            self.write({key: value})
        shutil.rmtree(broken, ignore_errors=True)
        log.error("%s was damaged (%s); %d of its scores could be read and are kept", self.file, error, saved)


def is_damage(error: Exception) -> bool:
    """Whether an error says that the file itself is damaged, not that it is locked, full or out of reach."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGE


def _connect(file: Path) -> sqlite3.Connection:
    return sqlite3.connect(file, timeout=WAIT_S, isolation_level=None, check_same_thread=False)


def _readable(file: Path) -> Iterator[tuple[Key, bytes]]:
    """Whatever values of a damaged file still hold; either table may tell where they are."""
    with contextlib.closing(_connect(file)) as connection:
        numbers: set[int] = set()
        for query in ("SELECT id FROM scores", "SELECT id FROM entries"):
            with contextlib.suppress(sqlite3.DatabaseError):
                numbers.update(row[0] for row in connection.execute(query) if isinstance(row[0], int))
        for number in sorted(numbers):
            with contextlib.suppress(sqlite3.DatabaseError):
                row = connection.execute("SELECT value FROM scores WHERE id = ?", (number,)).fetchone()
                key = key_of(row[0]) if row is not None and isinstance(row[0], bytes) else None
                if row is not None and key is not None:
                    yield key, row[0]


def _others(root: Path, own: Path) -> int:
    """Bytes of what other fingerprints left, as far as no server uses it."""
    return sum(_size(folder) for folder in _unused(root, own))


def _drop_oldest(root: Path, own: Path) -> bool:
    """Whether there was something of another fingerprint to drop."""
    folders = sorted(_unused(root, own), key=lambda folder: (folder / FILE).stat().st_mtime)
    if folders:
        log.info("dropping the scores in %s to make room", folders[0])
        shutil.rmtree(folders[0], ignore_errors=True)
    return bool(folders)


def _unused(root: Path, own: Path) -> list[Path]:
    found = []
    for file in root.glob(f"*/{FILE}"):
        if file.parent != own:
            with contextlib.suppress(OSError), (file.parent / LOCK).open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                found.append(file.parent)
    return found


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
