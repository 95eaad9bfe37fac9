"""Rows of files on disk: which files a path means, and the rows of each, read as far as they are asked for.

A path is a file, a folder of shards, or a pattern. It knows JSON by json_rows.py and Parquet, no shapes of rows.
"""

from __future__ import annotations

import glob
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

from student_trainer.data import json_rows
from student_trainer.errors import UserError

ENDINGS = (".json", ".jsonl", ".ndjson", ".parquet")
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""What lies beside the data in folders of `datasets`."""
BATCH_ROWS = 1024
_SPLITS = {"train": "train", "training": "train", "test": "test", "validation": "validation", "valid": "validation"}
_SPLITS |= {"val": "validation", "dev": "validation", "eval": "validation"}


Columns = Callable[[Sequence[str]], list[str]]
"""Which of a table's columns are to be read."""


def rows(source: str, columns: Columns, shuffle: int | None = None) -> Iterator[tuple[str, Any]]:
    """Each row of `source` with its place; of Parquet with `columns` alone.

    `shuffle` is a seed for the order of the shards; None keeps that of their names.
    """
    paths = shards(source)
    if shuffle is not None:
        Random(shuffle).shuffle(paths)
    for path in paths:
        yield from _rows(path, columns)


def shards(source: str) -> list[Path]:
    """The files that a path, folder or pattern means, by name; UserError where there are none, or of several splits."""
    path = Path(source)
    if path.is_dir():
        return _of_folder(path)
    if not path.exists() and glob.has_magic(source):
        found = sorted(p for p in map(Path, glob.glob(source, recursive=True)) if p.is_file())
        if not found:
            raise UserError("no file matches this pattern", source, "check it with ls, and put it between quotes")
        return found
    if not path.exists():
        step = "check data.data_path and data.val_path; relative paths start at the current directory"
        raise UserError("no such file", source, step)
    return [path]


def _of_folder(folder: Path) -> list[Path]:
    names = [p.relative_to(folder) for p in sorted(folder.rglob("*")) if p.is_file()]
    names = [n for n in names if not any(part.startswith((".", "_")) for part in n.parts) and _is_data(n)]
    if not names:
        what = f"a folder without data: no file in it ends with {', '.join(ENDINGS)}, or these with .gz or .zst"
        raise UserError(what, str(folder), "name a file, or a folder that has some")
    splits = Counter(split for name in names for split in {_split(name)} if split)
    if len(splits) > 1:
        held = ", ".join(f"{split} ({count} file{'s' * (count > 1)})" for split, count in sorted(splits.items()))
        first = next(name for name in names if _split(name) == ("train" if "train" in splits else min(splits)))
        word = re.sub(r"\d[-\d\w]*", "*", first.name.removesuffix("".join(first.suffixes)))
        step = f"name one of them, such as {folder / first.parent / word}{'' if '*' in word else '*'}"
        raise UserError(f"a folder with several splits: {held}", str(folder), step)
    return [folder / name for name in names]


def _is_data(name: Path) -> bool:
    bare = name.with_suffix("") if name.suffix.lower() in json_rows.COMPRESSED else name
    return bare.suffix.lower() in ENDINGS and name.name not in NOT_DATA


def _split(name: Path) -> str | None:
    """The split that a file's name (or its folder's) says it is of."""
    words = [w for part in reversed(name.parts) for w in re.split(r"[^a-z]+", part.lower())]
    return next((_SPLITS[w] for w in words if w in _SPLITS), None)


def _rows(path: Path, columns: Columns) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as file:
        magic = file.read(4)
    if magic == b"PAR1" or path.suffix.lower() == ".parquet":
        if not magic:
            raise UserError("the file is empty", str(path), "write the file again")
        return ((f"{path}, row {n}", row) for n, row in enumerate(_parquet(path, columns), start=1))
    return json_rows.rows(path)


def _parquet(path: Path, columns: Columns) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=columns(file.schema_arrow.names)):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"not a readable Parquet file: {error}", str(path), "write the file again") from error
