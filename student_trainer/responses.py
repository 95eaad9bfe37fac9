"""The teacher's responses as a Parquet dataset that people can read and reuse.

A dataset is a folder of parts (`responses.parquet/part-00000.parquet`, readable as one with pandas, DuckDB or
pyarrow) or one file. Parts are written while the responses arrive, and what is in none yet lies beside them
(unfinished.py), so that an interrupted collection goes on where it was. Knows the teachers and the file format,
nothing of training. Legend: P prompt tokens, R completion tokens.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from protos.scores import Completion, FinishReason, Ids, Message, Mode, Prompt, Sampling, TeacherInfo

from .asking import ask
from .data import metadata
from .errors import UserError
from .teachers import Teacher, Teachers, nobody
from .unfinished import Journal, left_over

log = logging.getLogger(__name__)

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
        ("domain", pa.string()),
        ("metadata", pa.string()),
        ("verified", pa.bool_()),
    ]
)
"""`prompt` is the conversation as JSON, `text` the completion without special tokens; `metadata` is what a verifier
needs (data/metadata.py), `verified` what it said (rejection.py). `expected` and what follows may be null.
"""
LATER = {"domain", "metadata", "verified"}
"""Columns that files of before lack."""


@dataclass(frozen=True, eq=False)
class Request:
    """What is asked: a conversation in one mode, rendered as int32[P]; what a verifier wants; its domain."""

    example_id: str
    messages: tuple[Message, ...]
    mode: Mode
    prompt_ids: Ids
    expected: str | None = None
    domain: str | None = None
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True, eq=False)
class Response(Request):
    """A request with the completion, int32[R], of the teacher with that fingerprint: an end token last where it
    stopped, none where it was cut.
    """

    sample: int = 0
    completion_ids: Ids = field(default_factory=lambda: np.zeros(0, np.int32))
    text: str = ""
    finish_reason: FinishReason = FinishReason.STOP
    teacher: str = ""
    verified: bool | None = None
    """Whether a verifier found it right; None where none has looked."""

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


def _table(responses: Sequence[Response], origin: Origin) -> pa.Table:
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
        "domain": [r.domain for r in responses],
        "metadata": [metadata.dump(r.metadata) for r in responses],
        "verified": [r.verified for r in responses],
    }
    return pa.table(columns, schema=_schema(origin))


def _write_part(folder: Path, table: pa.Table) -> None:
    """Appends one part; a reader sees all of it or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    number = len(list(folder.glob("part-*.parquet")))
    temporary = folder / f".part-{number:05d}.tmp"
    pq.write_table(table, temporary)
    os.replace(temporary, folder / f"part-{number:05d}.parquet")


def read(path: Path) -> tuple[list[Response], dict[str, Origin]]:
    """All responses of a dataset in the order of its parts, and where they come from, by the teachers' fingerprints."""
    if not path.exists():
        raise UserError(f"there is no dataset of responses at {path}; check non_policy_distillation.dataset_path")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    responses: list[Response] = []
    origins: dict[str, Origin] = {}
    for file in files:
        try:
            table = pq.read_table(file)
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{file} is no Parquet file that can be read: {str(error).splitlines()[0]}") from error
        missing = set(SCHEMA.names) - LATER - set(table.column_names)
        if missing:
            raise UserError(f"{file} is no dataset of responses, it lacks {', '.join(sorted(missing))}")
        for origin in _origins(table):
            other = origins.setdefault(origin.fingerprint, origin)
            if other != origin:
                raise UserError(f"{path} mixes responses of different teachers or samplings: {other} and {origin}")
        responses.extend(_rows(table))
    return responses, origins


def _origins(table: pa.Table) -> list[Origin]:
    """Where a file's rows come from; its metadata names one teacher, a row may name another one's fingerprint."""
    meta = {k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}
    known = {name: meta.get(f"strong2weak.{name}", "") for name in ("fingerprint", "teacher", "tokenizer_hash")}
    main = Origin(**known, sampling=meta.get("strong2weak.sampling", ""))
    found = [f or main.fingerprint for f in pa.compute.unique(table.column("teacher_fingerprint")).to_pylist()]
    return [main if f == main.fingerprint else replace(main, fingerprint=f, teacher="") for f in found]


def _rows(table: pa.Table) -> list[Response]:
    columns = {name: table.column(name) for name in SCHEMA.names if name in table.column_names}
    ids = {name: _lists(columns[name]) for name in ("prompt_ids", "completion_ids")}
    rest = {n: c.to_pylist() for n, c in columns.items() if n not in ids}
    nothing = [None] * table.num_rows
    domains, kept, verified = (rest.get(name, nothing) for name in ("domain", "metadata", "verified"))
    return [
        Response(
            example_id=rest["example_id"][i],
            messages=tuple(Message(**m) for m in json.loads(rest["prompt"][i])),
            mode=Mode(rest["mode"][i]),
            prompt_ids=ids["prompt_ids"][i],
            expected=rest["expected"][i],
            domain=domains[i],
            metadata=metadata.load(kept[i]),
            sample=rest["sample"][i],
            completion_ids=ids["completion_ids"][i],
            text=rest["text"][i],
            finish_reason=FinishReason(rest["finish_reason"][i]),
            teacher=rest["teacher_fingerprint"][i] or "",
            verified=verified[i],
        )
        for i in range(table.num_rows)
    ]


def _lists(column: pa.ChunkedArray) -> list[Ids]:
    lists = column.combine_chunks()
    flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int32)
    lengths = lists.value_lengths().to_numpy(zero_copy_only=False)
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


def reuse(
    path: Path, teachers: Teachers, domains: Mapping[str, str | None] | None = None, *, other_teacher: bool = False
) -> list[Response]:
    """An existing dataset for training against `teachers`. An example that `domains` knows by its id is of that domain.

    Refused (UserError, naming both values) where its tokens come from another tokenizer, where a response has no
    teacher, or, unless `other_teacher`, where another one than that wrote it.
    """
    responses, origins = read(path)
    if not responses:
        raise UserError(f"the dataset of responses at {path} is empty")
    first, domains = teachers.all[0].info, domains or {}
    for origin in origins.values():
        if origin.tokenizer_hash != first.tokenizer_hash:
            raise UserError(
                f"{path} was written with tokenizer {origin.tokenizer_hash or 'unknown'}, the teacher {first.name} has "
                f"{first.tokenizer_hash}; its token ids mean other text here, collect new responses"
            )
    responses = [replace(r, domain=domains.get(r.example_id, r.domain)) for r in responses]
    found = {(r.mode, r.domain) for r in responses}
    missing = [c for c in found if teachers.find(*c) is None]
    if missing:
        raise nobody(missing)
    for response in responses:
        teacher, origin = teachers.of(response.mode, response.domain), origins[response.teacher]
        if origin.fingerprint != teacher.info.fingerprint and not other_teacher:
            where = "" if len(teachers.all) == 1 else f" for {teacher.scope}"
            raise UserError(
                f"it holds responses of teacher {origin.teacher or '?'} ({origin.fingerprint or 'unknown'}), "
                f"this teacher{where} is {teacher.info.name} ({teacher.info.fingerprint})",
                str(path),
                "set non_policy_distillation.allow_other_teacher=true to train on them anyway",
            )
    return responses


def collect(
    teachers: Teachers,
    requests: Sequence[Request],
    sampling: Sampling,
    folder: Path,
    *,
    samples: int = 1,
    progress: Callable[[int, int, int], None] | None = None,
) -> list[Response]:
    """The teachers' responses to every request, `samples` for each, asking only for what `folder` does not hold yet.

    `progress(done, total, tokens)` is called as they arrive. What arrived is kept at once, and in a part after at most
    PART_SECONDS; a part holds responses of one teacher. Where some of a prompt's samples are there, the others are
    drawn with another seed. The order of the result is that of `requests`, whatever the order of arrival.
    """
    origins = {t.info.fingerprint: Origin.of(t.info, sampling) for t in teachers.all}
    asked = [teachers.of(r.mode, r.domain) for r in requests]
    known = _known(folder, origins, dict(zip(map(_key, requests), asked, strict=True)))
    wanted = [(*_key(r), s) for r in requests for s in range(samples)]
    missing: dict[tuple[int, ...], list[int]] = {}
    for i, r in enumerate(requests):
        if lacks := tuple(s for s in range(samples) if (*_key(r), s) not in known):
            missing.setdefault(lacks, []).append(i)
    waiting: dict[str, list[Response]] = {f: [] for f in origins}
    journals = {f: Journal(folder, f"unfinished-{i}", _schema(o)) for i, (f, o) in enumerate(origins.items())}
    tokens, written = 0, time.monotonic()

    def keep(request: Request, sample: int, completion: Completion) -> None:
        nonlocal tokens, written
        fingerprint = teachers.of(request.mode, request.domain).info.fingerprint
        response = Response(
            **vars(request),
            sample=sample,
            completion_ids=completion.token_ids,
            text=completion.text,
            finish_reason=completion.finish_reason,
            teacher=fingerprint,
        )
        if known.setdefault((*_key(request), sample), response) is not response:
            return
        waiting[fingerprint].append(response)
        journals[fingerprint].add(_table([response], origins[fingerprint]))
        tokens += len(completion.token_ids)
        if len(waiting[fingerprint]) >= PART_ROWS or time.monotonic() - written > PART_SECONDS:
            write()
            written = time.monotonic()
        if progress is not None:
            progress(len(known), len(wanted), tokens)

    def write() -> None:
        for fingerprint, responses in waiting.items():
            if responses:
                _write_part(folder, _table(responses, origins[fingerprint]))
                journals[fingerprint].drop()
                responses.clear()

    def ask_for(lacks: tuple[int, ...], todo: Sequence[int]) -> None:
        groups: dict[Teacher, list[int]] = {}
        for place, i in enumerate(todo):
            groups.setdefault(asked[i], []).append(place)
        prompts = [Prompt(token_ids=requests[i].prompt_ids, mode=requests[i].mode) for i in todo]
        how = sampling if len(lacks) == samples else _apart(sampling, lacks[0])
        ask(list(groups.items()), prompts, how, len(lacks), lambda p, s, c: keep(requests[todo[p]], lacks[s], c))

    try:
        for lacks, todo in sorted(missing.items(), key=lambda entry: -len(entry[0])):
            ask_for(lacks, todo)
    finally:
        write()
    return [known[key] for key in wanted]


def _apart(sampling: Sampling, first: int) -> Sampling:
    """`sampling` for what is missing from sample `first` on: a teacher numbers the samples of a call from 0, so those
    that are there would be drawn again.
    """
    if sampling.seed is None:
        return sampling
    return replace(sampling, seed=(sampling.seed + (first + 1) * 0xD1B54A32D192ED03) % 2**63)


def _recover(folder: Path) -> None:
    """Makes parts of what a killed process left unfinished."""
    for path, table in left_over(folder):
        there = {(*_key(r), r.sample) for r in read(folder)[0]} if any(folder.glob("*.parquet")) else set()
        new = [(*_key(r), r.sample) not in there for r in _rows(table)] if table.num_rows else []
        if any(new):
            _write_part(folder, table.filter(pa.array(new)))
            log.info("%s: %d responses of an interrupted collection are kept", folder, sum(new))
        path.unlink()


def _key(request: Request) -> tuple[str, Mode]:
    return request.example_id, request.mode


def _known(
    folder: Path, origins: Mapping[str, Origin], asked: Mapping[tuple[str, Mode], Teacher]
) -> dict[tuple[str, Mode, int], Response]:
    """What `folder` holds; UserError where it was begun with other teachers or another sampling."""
    if folder.is_dir():
        _recover(folder)
    if not folder.exists() or (folder.is_dir() and not any(folder.glob("*.parquet"))):
        return {}
    (found, there), first = read(folder), next(iter(origins.values()))
    for response in found:
        before, teacher = there[response.teacher], asked.get(_key(response))
        now = origins[teacher.info.fingerprint] if teacher else origins.get(response.teacher, first)
        if before != now:
            raise UserError(
                f"it was begun with {before.teacher} ({before.fingerprint}) and {before.sampling}, "
                f"now it is {now.teacher} ({now.fingerprint}) and {now.sampling}",
                str(folder),
                "start afresh without --resume",
            )
    return {(*_key(r), r.sample): r for r in found}


def fitting(responses: Sequence[Response], max_length: int) -> tuple[list[Response], int]:
    """The responses of at most `max_length` tokens with a completion, and how many were left out."""
    kept = [r for r in responses if r.tokens <= max_length and len(r.completion_ids)]
    return kept, len(responses) - len(kept)
