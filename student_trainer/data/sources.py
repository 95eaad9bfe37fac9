"""Where rows come from: the words of data.data_path, and the reader of each kind of source.

Adding a source: a function that yields (place, row) pairs, and its prefix here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from student_trainer.data import files, hub, tasks
from student_trainer.data.shapes import Format
from student_trainer.data_section import Data
from student_trainer.errors import UserError


@dataclass(frozen=True)
class Source:
    """Rows, each with its place for messages ("data.jsonl, line 3"), and by which keys they are read."""

    rows: Iterator[tuple[str, Any]]
    format: Format
    domain: str
    """Key of the domain."""
    metadata: tuple[str, ...]
    """Keys of what is kept for verifiers."""


def open_source(source: str, data: Data, shuffle: int | None = None) -> Source:
    """A source whose rows are read as far as they are asked for. `shuffle` is a seed for the order of its shards."""
    if source.startswith(tasks.PREFIX):
        form = Format("prompts", "question", "answer")
        return Source(tasks.rows(source), form, "task", ("task", "options", "metadata"))
    form = Format(data.format, data.prompt_column, data.answer_column)
    others = {data.domain_column, *data.metadata_columns}

    def columns(names: Sequence[str]) -> list[str]:
        return form.columns(names, others)

    folder, _, split = source.partition("#")
    if source.startswith(hub.PREFIX):
        rows = hub.hub_rows(source, columns, streaming=data.streaming, shuffle=shuffle)
    elif re.match(r"[a-z0-9]+://", source):
        raise UserError(
            "neither a path nor a hub dataset", source, "download it, or write hub:owner/name for one of the hub"
        )
    elif hub.is_saved(Path(folder)):
        rows = hub.saved_rows(source, Path(folder), split or None, columns)
    else:
        rows = files.rows(source, columns, shuffle)
    return Source(rows, form, data.domain_column, tuple(data.metadata_columns))
