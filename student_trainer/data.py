"""Examples: from JSON, JSON lines and Parquet files to conversations, with a part set apart for validation.

A row is either `instruction`, `input` and `output`, or chat `messages`, and may name its domain; other keys are
ignored. It knows no tokenizer. Everything that a file can have wrong ends in a UserError that names the file and the
row.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protos.scores import Message, Mode
from student_trainer.config import Data
from student_trainer.errors import UserError

log = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant", "tool")
MODES = tuple(mode.value for mode in Mode)
SHAPE = "a row has instruction, input and output, or messages"


@dataclass(frozen=True)
class Example:
    """A problem: the turns of its prompt, and what is expected (the record's output), where the data says so.

    `id` is a hash of both, stable over runs and machines.
    """

    id: str
    messages: tuple[Message, ...]
    expected: str | None = None
    domain: str | None = None
    """What the record's domain column says: it may choose the teacher, and is measured by itself."""


def load_examples(data: Data, seed: int) -> tuple[list[Example], list[Example]]:
    """The (training, validation) examples.

    Validation is `val_path`, or the share `val_ratio` of `data_path`: chosen by a hash of seed and example, so that it
    is the same in both stages and on every machine, and never empty where val_ratio is above 0 and there are two
    examples. Exact duplicates count once, so that none is in both parts.
    """
    examples = read_examples(Path(data.data_path), data.system_prompt, data.domain_column)[: data.max_examples]
    if data.val_path is not None:
        validation = read_examples(Path(data.val_path), data.system_prompt, data.domain_column)
        seen = {e.id for e in validation}
        train = [e for e in examples if e.id not in seen]
        if len(train) < len(examples):
            log.warning(
                "%s: %d examples are in %s too; left out", data.data_path, len(examples) - len(train), data.val_path
            )
        if not train:
            raise UserError("every example is in the validation file too", data.data_path, "use another data.val_path")
        return train, validation
    wanted = round(len(examples) * data.val_ratio)
    count = min(max(wanted, math.ceil(data.val_ratio)), len(examples) - 1)
    ranked = sorted(examples, key=lambda e: hashlib.sha256(f"{seed}\n{e.id}".encode()).digest())
    chosen = {e.id for e in ranked[:count]}
    return [e for e in examples if e.id not in chosen], [e for e in examples if e.id in chosen]


def read_examples(path: Path, system_prompt: str | None = None, domain_column: str = "domain") -> list[Example]:
    """The usable examples of one file, in its order; UserError where there are none. A blank domain is none."""
    examples: dict[str, Example] = {}
    rows = blank = strayed = 0
    for where, row in _read_rows(path):
        rows += 1
        messages, expected = _conversation(where, row)
        if not any(m.content.strip() for m in messages if m.role != "system"):
            blank += 1
            continue
        if system_prompt and messages[0].role != "system":
            messages = (Message("system", system_prompt), *messages)
        example = Example(_identity(messages, expected), messages, expected, _domain(where, row, domain_column))
        strayed += examples.setdefault(example.id, example).domain != example.domain
    if not examples:
        what = f"no usable rows: all {rows} are blank" if rows else "no rows"
        raise UserError(what, str(path), SHAPE)
    if blank or rows - blank > len(examples):
        repeated = rows - blank - len(examples)
        log.warning("%s: %d rows, left out %d blank and %d repeated ones", path, rows, blank, repeated)
    if strayed:
        log.warning("%s: %d of the repeated rows name another domain; the first one counts", path, strayed)
    return list(examples.values())


def _identity(messages: tuple[Message, ...], expected: str | None) -> str:
    content = json.dumps([[(m.role, m.content) for m in messages], expected], ensure_ascii=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()[:16]


def _read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row with its place for messages: "file, row 3"."""
    if path.is_dir():
        raise UserError("a folder, not a file", str(path), "name one JSON, JSON lines or Parquet file")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        step = "check data.data_path and data.val_path; relative paths start at the current directory"
        raise UserError("no such file", str(path), step) from None
    if not content.strip():
        raise UserError("the file is empty", str(path), SHAPE)
    if content[:4] == b"PAR1" or path.suffix.lower() == ".parquet":
        return _places(path, "row", _parquet_rows(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 at byte {error.start}", str(path), "save it as UTF-8") from error
    if text.lstrip()[0] == "[" and path.suffix.lower() not in (".jsonl", ".ndjson"):
        return _places(path, "row", _json_list(path, text))
    return _json_lines(path, text)


def _places(path: Path, word: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{path}, {word} {number}", row) for number, row in enumerate(rows, start=1))


def _json_list(path: Path, text: str) -> list[Any]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        what = f"not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        raise UserError(what, str(path), "mend the file or write it again") from error
    assert isinstance(rows, list)
    return rows


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            what = f"not valid JSON at column {error.colno}: {error.msg}"
            step = "the file must be a JSON list of rows, or one row on each line"
            raise UserError(what, where, step) from error
        yield where, row


def _parquet_rows(path: Path) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"not a readable Parquet file: {error}", str(path), "write the file again") from error


def _conversation(where: str, row: Any) -> tuple[tuple[Message, ...], str | None]:
    """The turns of a row's prompt and the expected answer."""
    if not isinstance(row, dict):
        raise UserError(f"{type(row).__name__}, not an object", where, SHAPE)
    if row.get("messages") is not None:
        return _chat(where, row["messages"])
    if row.get("instruction") is None and row.get("input") is None:
        raise UserError(f"neither instruction nor messages among its keys {sorted(map(str, row))}", where, SHAPE)
    instruction, extra, expected = (_text(where, row, key) for key in ("instruction", "input", "output"))
    content = "\n".join(part for part in (instruction, extra) if part)
    return (Message("user", content),), expected


def _text(where: str, row: dict[str, Any], key: str) -> str | None:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{key} is {_kind(value)}, not text", where, "write it between quotes")
    return value


def _domain(where: str, row: dict[str, Any], column: str) -> str | None:
    domain = _text(where, row, column)
    if domain in MODES:
        raise UserError(f"{column} is {domain}, which is the name of a mode", where, "give the domain another name")
    return domain if domain and domain.strip() else None


def _chat(where: str, messages: Any) -> tuple[tuple[Message, ...], str | None]:
    if not isinstance(messages, list) or not messages:
        raise UserError(
            f"messages is {_kind(messages)}, not a list of turns", where, "give role and content of each turn"
        )
    turns = []
    for number, turn in enumerate(messages, start=1):
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), str) or turn.get("role") not in ROLES:
            what = f"turn {number} of messages has no text content with a role of {', '.join(ROLES)}"
            raise UserError(what, where, 'write each turn as {"role": ..., "content": ...}')
        turns.append(Message(turn["role"], turn["content"]))
    expected = turns.pop().content if turns[-1].role == "assistant" else None
    if not turns:
        raise UserError("messages has an answer and no question", where, "put a user turn before it")
    return tuple(turns), expected


def _kind(value: Any) -> str:
    names = {bool: "a truth value", int: "a number", float: "a number", list: "a list", dict: "an object", str: "text"}
    return "empty" if value == [] else names.get(type(value), type(value).__name__)
