"""Rows of a JSON list or of JSON lines, plain or compressed, read piece by piece: a file larger than memory is fine.

Knows bytes, text and JSON, nothing of what a row means.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

from student_trainer.data.shapes import SHAPE
from student_trainer.errors import UserError

PIECE = 1 << 20
"""Bytes that are read at a time."""
LONGEST_ROW = 64 << 20
"""Characters after which what does not parse is no row that is still to be completed."""
COMPRESSED = {".gz": "gzip", ".zst": "zstd"}


def rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row with its place ("file, row 3"; "file, line 3" of JSON lines); UserError for what is no JSON."""
    pieces = _texts(path)
    head = ""
    for piece in pieces:
        head += piece
        if head.strip():
            break
    else:
        raise UserError("the file is empty", str(path), SHAPE)
    suffixes = [s.lower() for s in path.suffixes if s.lower() not in COMPRESSED]
    lines = suffixes[-1:] in ([".jsonl"], [".ndjson"])
    whole = chain([head], pieces)
    if head.lstrip()[0] == "[" and not lines:
        return ((f"{path}, row {number}", row) for number, row in enumerate(_List(path, whole), start=1))
    return _lines(path, whole)


def _texts(path: Path) -> Iterator[str]:
    """The file's text in pieces."""
    decoder, read = codecs.getincrementaldecoder("utf-8-sig")(), 0
    for piece in _pieces(path):
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(piece)
        except UnicodeDecodeError as error:
            raise _no_text(path, read - waiting + error.start) from error
        read += len(piece)
        if text:
            yield text
    waiting = len(decoder.getstate()[0])
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise _no_text(path, read - waiting + error.start) from error


def _no_text(path: Path, byte: int) -> UserError:
    return UserError(f"not UTF-8 at byte {byte}", str(path), "save it as UTF-8")


def _pieces(path: Path) -> Iterator[bytes]:
    compression = COMPRESSED.get(path.suffix.lower())
    with ExitStack() as stack:
        file: Any = stack.enter_context(path.open("rb"))
        if compression:
            import pyarrow as pa

            file = stack.enter_context(pa.CompressedInputStream(file, compression))
        while True:
            try:
                piece = file.read(PIECE)
            except (OSError, EOFError) as error:
                if not compression:
                    raise
                what = f"not a whole {compression} file: {error}"
                raise UserError(what, str(path), "compress or copy it again") from error
            if not piece:
                return
            yield piece


def _lines(path: Path, pieces: Iterator[str]) -> Iterator[tuple[str, Any]]:
    number, rest = 0, ""
    for piece in chain(pieces, ["\n"]):
        *whole, rest = (rest + piece).split("\n")
        for line in whole:
            number += 1
            if line.strip():
                yield f"{path}, line {number}", _row(f"{path}, line {number}", line)


def _row(where: str, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        what = f"not valid JSON at column {error.colno}: {error.msg}"
        raise UserError(what, where, "the file must be a JSON list of rows, or one row on each line") from error


class _List:
    """The values of one JSON list. `text` is what is read and not used yet, `lines` and `columns` what lies before."""

    def __init__(self, path: Path, pieces: Iterator[str]) -> None:
        self.path, self.pieces, self.decoder = path, pieces, json.JSONDecoder()
        self.text, self.at, self.lines, self.columns = "", 0, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self._next()
        self.at += 1  # the bracket that it was known by
        if self._next() != "]":
            yield self._value()
            while self._next() == ",":
                self.at += 1
                self._next()
                yield self._value()
        if self._next() != "]":
            raise self._broken("Expecting ',' delimiter", self.at)
        self.at += 1
        if self._next():
            raise self._broken("Extra data", self.at)

    def _next(self) -> str:
        """The next character that is no space, "" at the end; `at` is its place."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in " \t\r\n":
                self.at += 1
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _value(self) -> Any:
        while True:
            start = self.at
            try:
                value, end = self.decoder.raw_decode(self.text, start)
            except json.JSONDecodeError as error:
                if len(self.text) - start < LONGEST_ROW and self._more():
                    continue
                raise self._broken(error.msg, error.pos - start + self.at) from error
            cut = end == len(self.text) or self.text[end] not in ",] \t\r\n"
            if cut and len(self.text) - start < LONGEST_ROW and self._more():
                continue  # a number may go on: 1 and 2, 1 and e5
            self.at += end - start
            return value

    def _more(self) -> bool:
        """Drops what is used, and reads at least as much again as is left; False at the end of the file."""
        used = self.text[: self.at]
        breaks = used.count("\n")
        self.lines += breaks
        self.columns = len(used) - used.rfind("\n") - 1 if breaks else self.columns + len(used)
        self.text, self.at = self.text[self.at :], 0
        wanted, parts = max(len(self.text), 1), list[str]()
        while sum(map(len, parts)) < wanted and (piece := next(self.pieces, "")):
            parts.append(piece)
        self.text += "".join(parts)
        return bool(parts)

    def _broken(self, message: str, at: int) -> UserError:
        before = self.text[:at]
        breaks = before.count("\n")
        column = at - before.rfind("\n") if breaks else self.columns + at + 1
        what = f"not valid JSON at line {self.lines + breaks + 1}, column {column}: {message}"
        return UserError(what, str(self.path), "mend the file or write it again")
