"""Responses that have arrived and are in no part of a dataset yet, kept so that a killed process loses none.

Each is appended to a file of Arrow's stream format, which can be read up to the last whole one whatever ended the
writer. Knows tables, not what is in them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

log = logging.getLogger(__name__)

SUFFIX = ".arrows"


class Journal:
    """The responses of one teacher since its last part, in the hidden file `name` of a dataset's folder."""

    def __init__(self, folder: Path, name: str, schema: pa.Schema) -> None:
        self.path, self.schema = folder / f".{name}{SUFFIX}", schema
        self._file: BinaryIO | None = None
        self._writer: Any = None

    def add(self, table: pa.Table) -> None:
        """Appends rows. They outlive this process from here on, not a machine that loses power."""
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb")
            self._writer = pa.ipc.new_stream(self._file, self.schema)
        self._writer.write_table(table)
        self._file.flush()

    def drop(self) -> None:
        """Forgets all of them: they are in a part now."""
        if self._file is not None:
            self._file.close()
            self._file = self._writer = None
        self.path.unlink(missing_ok=True)


def left_over(folder: Path) -> Iterator[tuple[Path, pa.Table]]:
    """(file, rows that are whole) of each journal that a killed process left in `folder`."""
    for path in sorted(folder.glob(f".*{SUFFIX}")):
        batches: list[pa.RecordBatch] = []
        schema = None
        with path.open("rb") as file:
            try:
                reader = pa.ipc.open_stream(file)
                schema = reader.schema
                batches.extend(reader)
            except (pa.ArrowInvalid, OSError):
                log.debug("%s ends in the middle of a row", path)
        if schema is not None:
            yield path, pa.Table.from_batches(batches, schema)
        else:
            path.unlink()
