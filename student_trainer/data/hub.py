"""Rows of datasets that the `datasets` library reads: from the hub (hub:owner/name) and from save_to_disk's folders.

Knows that library, no shapes of rows. It comes with `pip install 'strong2weak[datasets]'`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx

from student_trainer.data.files import BATCH_ROWS, Columns
from student_trainer.errors import UserError, one_line

PREFIX = "hub:"
HOW = "write hub:owner/name, with :config, @revision and #split where they are needed"


@dataclass(frozen=True)
class HubName:
    """A dataset of the hub (or a folder laid out like one), its configuration, revision and split."""

    name: str
    config: str | None = None
    revision: str | None = None
    split: str = "train"


def parse(source: str) -> HubName:
    """What `hub:owner/name:config@revision#split` means; UserError where it is not of this form."""
    found = re.fullmatch(r"hub:(?P<name>[^:@#]+)(:(?P<config>[^@#]+))?(@(?P<revision>[^#]+))?(#(?P<split>.+))?", source)
    if found is None:
        raise UserError("not the name of a hub dataset", source, HOW)
    return HubName(found["name"], found["config"], found["revision"], found["split"] or "train")


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def hub_rows(source: str, columns: Columns, *, streaming: bool, shuffle: int | None) -> Iterator[tuple[str, Any]]:
    """Each row of a hub dataset with its place.

    `streaming` reads over the network as far as rows are asked for, else the dataset is downloaded once. `shuffle` is
    a seed for the order of the shards of a stream; what was downloaded keeps its order.
    """
    name = parse(source)
    with _explained(source):
        import datasets

        found = datasets.load_dataset(
            name.name, name.config, split=name.split, revision=name.revision, streaming=streaming
        )
        shards = [found]
        if streaming and shuffle is not None and found.num_shards > 1:
            shards = [found.shard(found.num_shards, i) for i in range(found.num_shards)]
            Random(shuffle).shuffle(shards)
    return _rows(source, shards, columns)


def saved_rows(source: str, folder: Path, split: str | None, columns: Columns) -> Iterator[tuple[str, Any]]:
    """Each row of a folder of save_to_disk with its place; of several splits, those of `split` (default: train)."""
    with _explained(source):
        import datasets

        found = datasets.load_from_disk(str(folder))
        if isinstance(found, datasets.DatasetDict):
            if (split or "train") not in found:
                held = ", ".join(sorted(found))
                raise UserError(f"it has no split {split or 'train'}", source, f"name one after #: {held}")
            found = found[split or "train"]
        elif split not in (None, str(found.split)):
            raise UserError(f"it is split {found.split}, not {split}", source, "leave out what is after #")
    return _rows(source, [found], columns)


def _rows(source: str, shards: Sequence[Any], columns: Columns) -> Iterator[tuple[str, Any]]:
    """The rows of each Dataset or IterableDataset, one after the other."""
    number = 0
    for shard in shards:
        with _explained(source):
            names = shard.column_names
            chosen = shard if names is None else shard.select_columns(columns(names))
            for table in chosen.with_format("arrow").iter(batch_size=BATCH_ROWS):
                for row in table.to_pylist():
                    number += 1
                    yield f"{source}, row {number}", row


@contextmanager
def _explained(source: str) -> Iterator[None]:
    """What the library, its files and the network raise, as one line with a next step."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (ValueError, OSError, RuntimeError, DatasetsError, httpx.HTTPError) as error:
        raise UserError(
            f"datasets cannot read it: {one_line(str(error), 240)}",
            source,
            f"{HOW}; check its page on the hub, the network, and for private ones `hf auth login`",
        ) from error
