"""Scores asked for ahead of the step that needs them, and kept: over epochs, and over runs of the same training.

A store belongs to one teacher fingerprint and one specification. What it learns goes to an append-only file, of which
each process writes its own and reads all: a record is the arrays of one score, one after the other, and an index
entry (digest of ids and start, place, rows, checksum) is written only after its record, so a crash costs at most the
last one. Scores are read back by `pread`, so the memory that they take is the system's file cache. Knows the teacher
client; no torch, no loss. Legend: T rows, K alternatives, M temperatures.
"""

from __future__ import annotations

import hashlib
import os
import struct
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from protos.scores import Field, Scores, ScoreSpec
from protos.scores import Sequence as Tokens

from .storage import write_json
from .teacher_client import TeacherClient

_ENTRY = struct.Struct("<16sQII")
"""Digest, place of the record in bytes, rows T, CRC-32 of the record."""

Wait = Callable[[], list[Scores]]


class AskedScores:
    """Scores that are asked for whenever they are needed and kept by nobody: hidden states, which fill a disk.

    10,000 responses of 500 tokens are 40 GB of them at width 4096, and the teacher computes them in one forward pass.
    """

    def __init__(self, client: TeacherClient, spec: ScoreSpec) -> None:
        self._client, self.spec, self.asked = client, spec, 0

    def request(self, sequences: Sequence[Tokens]) -> Wait:
        """Asks for all of them, at once and in one call; the result waits and gives all scores."""
        self.asked += len(sequences)
        return self._client.submit_score(sequences, self.spec).result

    def keep(self) -> None:
        """Nothing: these are not kept."""

    def close(self) -> None:
        """Nothing: whoever asked waits, or the client is closed."""


class _Place(NamedTuple):
    file: int
    offset: int
    rows: int
    checksum: int


def digest(sequence: Tokens) -> bytes:
    """16 bytes that name a sequence and where its scores start."""
    return hashlib.blake2b(sequence.token_ids.tobytes(), digest_size=16, salt=sequence.score_start.to_bytes(8)).digest()


class ScoreStore:
    """The scores of one teacher under one specification (no candidates: those change with the student).

    `spec` is that specification; `asked` counts the sequences that went to the teacher.
    """

    def __init__(
        self, client: TeacherClient, fingerprint: str, spec: ScoreSpec, folder: Path, *, rank: int = 0
    ) -> None:
        self._client, self.spec = client, spec
        self._k, self._m = spec.top_k, len(spec.temperatures)
        name = hashlib.blake2b(f"{fingerprint} {spec}".encode(), digest_size=8).hexdigest()
        self._folder = folder / name
        self._folder.mkdir(parents=True, exist_ok=True)
        self._rank = rank
        self._known: dict[bytes, _Place] = {}
        self._flying: dict[bytes, tuple[Future[list[Scores]], int]] = {}
        self._read: dict[str, int] = {}
        self._fds: dict[str, int] = {}
        self.asked = 0
        if rank == 0:
            temperatures = list(spec.temperatures)
            about = {"fingerprint": fingerprint, "top_k": spec.top_k, "temperatures": temperatures}
            write_json(self._folder / "about.json", about)
        flags = os.O_CREAT | os.O_RDWR | os.O_APPEND
        self._data = os.open(self._folder / f"scores-{rank}.bin", flags)
        self._index = os.open(self._folder / f"scores-{rank}.idx", flags)
        whole = os.fstat(self._index).st_size // _ENTRY.size * _ENTRY.size
        os.ftruncate(self._index, whole)
        self._end = os.fstat(self._data).st_size
        self._refresh()

    def __len__(self) -> int:
        return len(self._known)

    def request(self, sequences: Sequence[Tokens]) -> Wait:
        """Asks for what is neither known nor under way, at once and in one call; the result waits and gives all scores.

        It may be called once or never; what was asked for and not waited for is kept by the next wait of the same
        sequence.
        """
        keys = [digest(s) for s in sequences]
        if any(k not in self._known and k not in self._flying for k in keys):
            self._refresh()
        missing = {k: s for k, s in zip(keys, sequences, strict=True) if k not in self._known and k not in self._flying}
        if missing:
            future = self._client.submit_score(list(missing.values()), self.spec)
            self.asked += len(missing)
            self._flying.update({key: (future, i) for i, key in enumerate(missing)})
        return lambda: [self._take(key, s) for key, s in zip(keys, sequences, strict=True)]

    def keep(self) -> None:
        """Keeps what has arrived and was not waited for yet."""
        for key, (future, i) in list(self._flying.items()):
            if future.done() and not future.cancelled() and future.exception() is None:
                self._keep(key, future.result()[i])
                del self._flying[key]

    def close(self) -> None:
        """Keeps what has arrived and closes the files."""
        self.keep()
        for future, _ in self._flying.values():
            future.cancel()
        self._flying.clear()
        for fd in (self._data, self._index, *self._fds.values()):
            os.close(fd)
        self._fds.clear()

    def _take(self, key: bytes, sequence: Tokens) -> Scores:
        flight = self._flying.pop(key, None)
        if flight is not None:
            scores = flight[0].result()[flight[1]]
            self._keep(key, scores)
            return scores
        kept = self._load(self._known[key]) if key in self._known else None
        if kept is not None:
            return kept
        self._known.pop(key, None)
        self.asked += 1
        scores = self._client.score([sequence], self.spec)[0]
        self._keep(key, scores)
        return scores

    def _keep(self, key: bytes, scores: Scores) -> None:
        record = b"".join(np.ascontiguousarray(a).tobytes() for a in self._arrays(scores))
        _write(self._data, record)
        entry = _Place(self._data, self._end, scores.positions, zlib.crc32(record))
        self._end += len(record)
        _write(self._index, _ENTRY.pack(key, *entry[1:]))
        self._known[key] = entry

    def _arrays(self, scores: Scores) -> Sequence[npt.NDArray[np.generic]]:
        tokens = [scores.token_logprobs, scores.log_normalizer]
        arrays = [scores.top_token_ids, scores.top_logprobs, scores.tail_logprob, *tokens] if self._k else tokens
        found = [a for a in arrays if a is not None]
        assert len(found) == len(arrays), "a score came without a field that was asked for"
        return found

    def _load(self, place: _Place) -> Scores | None:
        """The record at `place`; None where it is not whole."""
        t, k, m = place.rows, self._k, self._m
        tail = m if k else 0
        record = os.pread(place.file, 4 * t * (2 * k + tail + 1 + m), place.offset)
        if zlib.crc32(record) != place.checksum:
            return None
        ids = np.frombuffer(record, np.int32, t * k).reshape(t, k)
        floats = np.frombuffer(record, np.float32)[t * k :]
        top, tails, token, normalizer = np.split(floats, np.cumsum([t * k, t * tail, t]))
        if not k:
            return Scores(token, log_normalizer=normalizer.reshape(t, m))
        return Scores(token, ids, top.reshape(t, k), None, normalizer.reshape(t, m), tails.reshape(t, m))

    def _refresh(self) -> None:
        """Learns what this and the other processes have written since the last look."""
        for file in sorted(self._folder.glob("scores-*.idx")):
            seen, size = self._read.get(file.name, 0), file.stat().st_size
            if size - seen < _ENTRY.size:
                continue
            if file.name not in self._fds:
                self._fds[file.name] = os.open(file.with_suffix(".bin"), os.O_RDONLY)
            with file.open("rb") as stream:
                stream.seek(seen)
                entries = stream.read((size - seen) // _ENTRY.size * _ENTRY.size)
            for key, offset, rows, checksum in _ENTRY.iter_unpack(entries):
                self._known.setdefault(key, _Place(self._fds[file.name], offset, rows, checksum))
            self._read[file.name] = seen + len(entries)


def open_store(
    client: TeacherClient, fingerprint: str, spec: ScoreSpec, folder: Path, rank: int
) -> ScoreStore | AskedScores:
    """What keeps the scores of `spec`, or asks anew where they are too large to keep."""
    if Field.HIDDEN_STATES in spec.want:
        return AskedScores(client, spec)
    return ScoreStore(client, fingerprint, spec, folder, rank=rank)


def _write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
