"""Rejection sampling: which of the teacher's responses a student trains on, by a verifier.

A dataset keeps every response, with what the verifier said in its column `verified`; the others are only left out of
the training. Knows responses and verifiers, no training. Legend: a group is the responses of a prompt in one mode.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from protos.scores import Mode

from . import distributed
from .config import Config, NonPolicyDistillation
from .errors import UserError
from .evaluation import example_of
from .responses import SCHEMA, Response
from .verifiers import Verifier, is_right, load_verifier

log = logging.getLogger(__name__)

KEY = "non_policy_distillation.keep"
Group = tuple[str, Mode]
Key = tuple[str, Mode, int]


def verifier_of(config: Config) -> tuple[str, Verifier] | None:
    """The name and function of what judges responses, None where all are kept; UserError where nothing does."""
    options = config.non_policy_distillation
    if options.keep == "all":
        return None
    own = options.verifier is not None
    name = options.verifier or config.evaluation.verifier
    verifier = load_verifier(name, "non_policy_distillation.verifier" if own else "evaluation.verifier")
    if name is None or verifier is None:
        step = "set non_policy_distillation.verifier or evaluation.verifier, or keep=all"
        raise UserError(f"{options.keep} needs a verifier, and none is named", KEY, step)
    return name, verifier


def judged(responses: Sequence[Response], verifier: Verifier) -> list[Response]:
    """The responses with what the verifier says of each."""
    return [replace(r, verified=is_right(verifier, r.text, example_of(r))) for r in responses]


def chosen(responses: Sequence[Response], options: NonPolicyDistillation) -> list[Response]:
    """Those to train on, in their order.

    `keep_per_prompt` of each group: the first samples, with `shortest_verified` those of fewest tokens (one where it is
    null).
    """
    shortest = options.keep == "shortest_verified"
    cap = options.keep_per_prompt or (1 if shortest else len(responses))
    groups: dict[Group, list[Response]] = {}
    for response in responses:
        if options.keep == "all" or response.verified:
            groups.setdefault(_group(response), []).append(response)
    ranked = {
        group: sorted(own, key=lambda r: (len(r.completion_ids) if shortest else 0, r.sample))[:cap]
        for group, own in groups.items()
    }
    kept = {_key(r) for own in ranked.values() for r in own}
    return [r for r in responses if _key(r) in kept]


def mark(folder: Path, verdicts: Mapping[Key, bool], name: str) -> None:
    """Writes what the verifier `name` said into the column `verified` of a dataset's parts, each replaced as a whole.

    A response that `verdicts` lacks keeps what its column says.
    """
    for path in sorted(folder.glob("part-*.parquet")):
        table = pq.read_table(path)
        before = table.column("verified").to_pylist() if "verified" in table.column_names else [None] * table.num_rows
        columns = (table.column(column).to_pylist() for column in ("example_id", "mode", "sample"))
        keys = zip(*columns, strict=True)
        said = [verdicts.get((e, Mode(m), s), b) for (e, m, s), b in zip(keys, before, strict=True)]
        meta = {**(table.schema.metadata or {}), b"strong2weak.verifier": name.encode()}
        if said == before and meta == table.schema.metadata:
            continue
        bare = table.drop_columns(["verified"]) if "verified" in table.column_names else table
        marked = bare.append_column(SCHEMA.field("verified"), pa.array(said, pa.bool_())).replace_schema_metadata(meta)
        temporary = folder / f".{path.stem}.tmp"
        pq.write_table(marked, temporary)
        os.replace(temporary, path)


def accepted(
    config: Config, responses: Sequence[Response], fits: Sequence[Response], source: Path, *, ours: bool
) -> list[Response]:
    """Those of `fits` that a student trains on as configured, of all `responses` of the dataset `source`.

    One process judges for all. Where the dataset is this run's own (`ours`) it remembers what was said; somebody
    else's is not written to. UserError where no response is left.
    """
    options = config.non_policy_distillation
    if options.keep != "all":
        verdicts = distributed.on_main(lambda: _verdicts(config, responses, source if ours else None))
        fits = [replace(r, verified=verdicts[_key(r)]) for r in fits]
    kept = chosen(fits, options)
    if options.keep != "all" or len(kept) < len(fits):
        for line in summary(fits, kept):
            log.info(line)
    if fits and not kept:
        unknown = sum(r.expected is None for r in fits)
        hint = f" ({unknown} of them have no expected output)" if unknown else ""
        step = "read some of them beside what was expected, use another verifier, or set keep=all"
        raise UserError(f"the verifier finds none of {len(fits)} responses right{hint}: {source}", KEY, step)
    return kept


def remembered(config: Config, responses: Sequence[Response], folder: Path) -> list[Response]:
    """The responses as they are judged where the configuration names a verifier for them, as the dataset remembers."""
    if config.non_policy_distillation.keep == "all":
        return list(responses)
    verdicts = _verdicts(config, responses, folder)
    return [replace(r, verified=verdicts[_key(r)]) for r in responses]


def _verdicts(config: Config, responses: Sequence[Response], folder: Path | None) -> dict[Key, bool]:
    """What the verifier says of each, written to the dataset `folder` too where there is one."""
    judge = verifier_of(config)
    assert judge is not None, "all responses are kept"
    name, verifier = judge
    said = {_key(r): bool(r.verified) for r in judged(responses, verifier)}
    if folder is not None:
        mark(folder, said, name)
    return said


def summary(responses: Sequence[Response], kept: Sequence[Response]) -> list[str]:
    """What was kept and what was rejected, in one line for each mode."""
    lines = []
    for mode in Mode:
        own = [r for r in responses if r.mode is mode]
        if not own:
            continue
        groups = Counter(_group(r) for r in own)
        line = f"{mode.value}: {sum(r.mode is mode for r in kept)} of {len(own)} responses are trained on"
        if any(r.verified is not None for r in own):
            right = [r for r in own if r.verified]
            none = len(groups) - len({_group(r) for r in right})
            line += f"; {len(right)} are right ({len(right) / len(own):.0%})"
            line += f", {none} of {len(groups)} prompts have no right one"
        lines.append(line)
    return lines


def _group(response: Response) -> Group:
    return response.example_id, response.mode


def _key(response: Response) -> Key:
    return response.example_id, response.mode, response.sample
