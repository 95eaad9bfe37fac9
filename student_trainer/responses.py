"""The teacher's responses as a Parquet dataset that people can read and reuse.

A dataset is a folder of parts (`responses.parquet/part-00000.parquet`, readable as one with pandas, DuckDB or
pyarrow) or one file. Parts are written while the responses arrive, so that an interrupted collection goes on where it
was. Knows the teacher client and the file format, nothing of training. Legend: P prompt tokens, R completion tokens.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from protos.scores import Completion, FinishReason, Ids, Message, Mode, Prompt, Sampling, TeacherInfo

from .errors import UserError
from .teacher_client import TeacherClient

PART_ROWS = 1024
PART_SECONDS = 60.0

SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("mode", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("expected", pa.string()),
        ("teacher_fingerprint", pa.string()),
    ]
)
"""`prompt` is the conversation as JSON, `text` the completion without special tokens; `expected` may be null."""


@dataclass(frozen=True, eq=False)
class Request:
    """What the teacher is asked: a conversation in one mode, rendered as int32[P], and what a verifier expects."""

    example_id: str
    messages: tuple[Message, ...]
    mode: Mode
    prompt_ids: Ids
    expected: str | None = None


@dataclass(frozen=True, eq=False)
class Response(Request):
    """A request with the teacher's completion, int32[R]: an end token last where it stopped, none where it was cut."""

    sample: int = 0
    completion_ids: Ids = field(default_factory=lambda: np.zeros(0, np.int32))
    text: str = ""
    finish_reason: FinishReason = FinishReason.STOP

    @property
    def ids(self) -> Ids:
        """int32[P+R], prompt and completion."""
        return np.concatenate([self.prompt_ids, self.completion_ids])

    @property
    def tokens(self) -> int:
        """P + R."""
        return len(self.prompt_ids) + len(self.completion_ids)


@dataclass(frozen=True)
class Origin:
    """Where a dataset comes from: the teacher, its tokenizer, and how it sampled."""

    fingerprint: str
    teacher: str
    tokenizer_hash: str
    sampling: str

    @staticmethod
    def of(info: TeacherInfo, sampling: Sampling) -> Origin:
        """The origin of what `info` samples with `sampling`."""
        how = {k: v for k, v in vars(sampling).items() if v not in (None, (), 0, False) or k == "temperature"}
        return Origin(info.fingerprint, info.name, info.tokenizer_hash, json.dumps(how, sort_keys=True))


def _schema(origin: Origin) -> pa.Schema:
    return SCHEMA.with_metadata({f"strong2weak.{k}": v for k, v in vars(origin).items()})


def _write_part(folder: Path, responses: Sequence[Response], origin: Origin) -> None:
    """Appends one part; a reader sees all of it or nothing."""
    columns: dict[str, list[Any]] = {
        "example_id": [r.example_id for r in responses],
        "mode": [r.mode.value for r in responses],
        "sample": [r.sample for r in responses],
        "prompt": [json.dumps([vars(m) for m in r.messages], ensure_ascii=False) for r in responses],
        "prompt_ids": [r.prompt_ids for r in responses],
        "completion_ids": [r.completion_ids for r in responses],
        "text": [r.text for r in responses],
        "finish_reason": [r.finish_reason.value for r in responses],
        "expected": [r.expected for r in responses],
        "teacher_fingerprint": [origin.fingerprint] * len(responses),
    }
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("part-*.parquet")))
    temporary = folder / f".part-{number:05d}.tmp"
    pq.write_table(pa.table(columns, schema=_schema(origin)), temporary)
    os.replace(temporary, folder / f"part-{number:05d}.parquet")


def read(path: Path) -> tuple[list[Response], Origin | None]:
    """All responses of a dataset in the order of its parts, and where they come from (None for an empty folder)."""
    if not path.exists():
        raise UserError(f"there is no dataset of responses at {path}; check non_policy_distillation.dataset_path")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    responses: list[Response] = []
    origin = None
    for file in files:
        try:
            table = pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file} is no Parquet file that can be read: {str(error).splitlines()[0]}") from error
        missing = set(SCHEMA.names) - set(table.column_names)
        if missing:
            raise UserError(f"{file} is no dataset of responses, it lacks {', '.join(sorted(missing))}")
        meta = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
        known = {name: meta.get(f"strong2weak.{name}", "") for name in ("fingerprint", "teacher", "tokenizer_hash")}
        part = Origin(**known, sampling=meta.get("strong2weak.sampling", ""))
        if origin is not None and part != origin:
            raise UserError(f"{path} mixes responses of different teachers or samplings: {origin} and {part}")
        origin = part
        responses.extend(_rows(table))
    return responses, origin


def _rows(table: pa.Table) -> list[Response]:
    columns = {name: table.column(name) for name in SCHEMA.names}
    ids = {name: _lists(columns[name]) for name in ("prompt_ids", "completion_ids")}
    rest = {n: c.to_pylist() for n, c in columns.items() if n not in ids}
    return [
        Response(
            example_id=rest["example_id"][i],
            messages=tuple(Message(**m) for m in json.loads(rest["prompt"][i])),
            mode=Mode(rest["mode"][i]),
            prompt_ids=ids["prompt_ids"][i],
            expected=rest["expected"][i],
            sample=rest["sample"][i],
            completion_ids=ids["completion_ids"][i],
            text=rest["text"][i],
            finish_reason=FinishReason(rest["finish_reason"][i]),
        )
        for i in range(table.num_rows)
    ]


def _lists(column: pa.ChunkedArray) -> list[Ids]:
    lists = column.combine_chunks()
    flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


def reuse(path: Path, info: TeacherInfo, *, other_teacher: bool = False) -> list[Response]:
    """An existing dataset for training against the teacher `info`.

    Refused (UserError, naming both values) where its tokens come from another tokenizer, or, unless `other_teacher`,
    where another teacher wrote it.
    """
    responses, origin = read(path)
    if origin is None or not responses:
        raise UserError(f"the dataset of responses at {path} is empty")
    if origin.tokenizer_hash != info.tokenizer_hash:
        raise UserError(
            f"{path} was written with tokenizer {origin.tokenizer_hash or 'unknown'}, the teacher {info.name} has "
            f"{info.tokenizer_hash}; its token ids mean other text here, collect new responses"
        )
    if origin.fingerprint != info.fingerprint and not other_teacher:
        raise UserError(
            f"it holds responses of teacher {origin.teacher or '?'} ({origin.fingerprint or 'unknown'}), "
            f"this teacher is {info.name} ({info.fingerprint})",
            str(path),
            "set non_policy_distillation.allow_other_teacher=true to train on them anyway",
        )
    return responses


def collect(
    client: TeacherClient,
    info: TeacherInfo,
    requests: Sequence[Request],
    sampling: Sampling,
    folder: Path,
    *,
    samples: int = 1,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Response]:
    """The teacher's responses to every request, `samples` for each, asking only for what `folder` does not hold yet.

    `progress(done, total, tokens)` is called as they arrive. What arrived is on disk after at most PART_SECONDS. The
    order of the result is that of `requests`, whatever the order of arrival.
    """
    origin = Origin.of(info, sampling)
    known: dict[tuple[str, Mode, int], Response] = {}
    if folder.exists():
        found, there = read(folder)
        if there is not None and there != origin:
            raise UserError(
                f"it was begun with {there.teacher} ({there.fingerprint}) and {there.sampling}, "
                f"now it is {origin.teacher} ({origin.fingerprint}) and {origin.sampling}",
                str(folder),
                "start afresh without --resume",
            )
        known = {(r.example_id, r.mode, r.sample): r for r in found}
    wanted = [(r.example_id, r.mode, s) for r in requests for s in range(samples)]
    todo = [r for r in requests if any((r.example_id, r.mode, s) not in known for s in range(samples))]
    waiting: list[Response] = []
    tokens, written = 0, time.monotonic()

    def keep(index: int, sample: int, completion: Completion) -> None:
        nonlocal tokens, written
        request = todo[index]
        response = Response(
            **vars(request),
            sample=sample,
            completion_ids=completion.token_ids,
            text=completion.text,
            finish_reason=completion.finish_reason,
        )
        if known.setdefault((request.example_id, request.mode, sample), response) is not response:
            return
        waiting.append(response)
        tokens += len(completion.token_ids)
        if len(waiting) >= PART_ROWS or time.monotonic() - written > PART_SECONDS:
            _write_part(folder, waiting, origin)
            waiting.clear()
            written = time.monotonic()
        if progress is not None:
            progress(len(known), len(wanted), tokens)

    try:
        if todo:
            prompts = [Prompt(token_ids=r.prompt_ids, mode=r.mode) for r in todo]
            client.generate(prompts, sampling, n=samples, on_completion=keep)
    finally:
        if waiting:
            _write_part(folder, waiting, origin)
    return [known[key] for key in wanted]


def fitting(responses: Sequence[Response], max_length: int) -> tuple[list[Response], int]:
    """The responses of at most `max_length` tokens with a completion, and how many were left out."""
    kept = [r for r in responses if r.tokens <= max_length and len(r.completion_ids)]
    return kept, len(responses) - len(kept)
