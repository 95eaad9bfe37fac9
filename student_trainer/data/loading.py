"""Examples of a run: from rows to conversations without repetitions, with a part set apart for validation.

It knows no tokenizer, and of sources and shapes only that there are some. Rows are read as far as `max_examples` needs,
so memory holds the examples and a buffer, whatever the source has.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from protos.scores import Message, Mode
from student_trainer.data import metadata, shapes
from student_trainer.data.example import Example, identity
from student_trainer.data.sources import Source, open_source
from student_trainer.data_section import Data
from student_trainer.errors import UserError

log = logging.getLogger(__name__)

MODES = tuple(mode.value for mode in Mode)
PromptTokens = Callable[[tuple[Message, ...]], int]
"""How many tokens a prompt of these turns has."""
T = TypeVar("T")


def load_examples(
    data: Data, seed: int, prompt_tokens: PromptTokens | None = None
) -> tuple[list[Example], list[Example]]:
    """The (training, validation) examples.

    Validation is `val_path`, or the share `val_ratio` of `data_path`: chosen by a hash of seed and example, so that it
    is the same in both stages and on every machine, and never empty where val_ratio is above 0 and there are two
    examples. Exact duplicates count once, so that none is in both parts. `prompt_tokens` measures for
    `max_prompt_length`.
    """
    examples = read_examples(data.data_path, data, seed=seed, limit=data.max_examples, prompt_tokens=prompt_tokens)
    if data.val_path is not None:
        validation = read_examples(data.val_path, data, prompt_tokens=prompt_tokens)
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


def read_examples(
    source: str | Path,
    data: Data | None = None,
    *,
    seed: int | None = None,
    limit: int | None = None,
    prompt_tokens: PromptTokens | None = None,
) -> list[Example]:
    """The usable examples of one source, as `data` says (default: its defaults), at most `limit` of them.

    With `seed` they are drawn from `data.shuffle_buffer` rows, else they keep their order. UserError where there are
    none. A blank domain is none.
    """
    data = data or Data()
    longest = data.max_prompt_length
    assert longest is None or prompt_tokens is not None, "max_prompt_length needs to know how many tokens a prompt has"
    shuffle = None if seed is None or not data.shuffle_buffer else seed
    opened = open_source(str(source), data, shuffle)
    rows = opened.rows if shuffle is None else shuffled(opened.rows, data.shuffle_buffer, shuffle)
    examples: dict[str, Example] = {}
    found: Counter[str] = Counter()
    for where, row in rows:
        found["rows"] += 1
        example = _example(where, row, opened, data.system_prompt)
        if example is None:
            found["blank"] += 1
        elif example.id in examples:
            found["repeated"] += 1
            found["strayed"] += examples[example.id].domain != example.domain
        elif longest is not None and prompt_tokens is not None and prompt_tokens(example.messages) > longest:
            found["long"] += 1
        else:
            examples[example.id] = example
            if len(examples) == limit:
                break
    _report(str(source), found, longest, bool(examples))
    return list(examples.values())


def shuffled(items: Iterable[T], size: int, seed: int) -> Iterator[T]:
    """The items in an order drawn by `seed` from a buffer of `size` of them, which is all that is held."""
    random, rest = Random(seed), iter(items)
    buffer = list(islice(rest, size))
    for item in rest:
        place = random.randrange(len(buffer))
        buffer[place], item = item, buffer[place]
        yield item
    random.shuffle(buffer)
    yield from buffer


def _example(where: str, row: Any, source: Source, system_prompt: str | None) -> Example | None:
    found = shapes.conversation(where, row, source.format)
    if found.blank:
        return None
    messages = found.messages
    if system_prompt and messages[0].role != "system":
        messages = (Message("system", system_prompt), *messages)
    domain = shapes.text(where, row, source.domain)
    if domain in MODES:
        what = f"{source.domain} is {domain}, which is the name of a mode"
        raise UserError(what, where, "give the domain another name")
    domain = domain if domain and domain.strip() else None
    kept = _metadata(where, row, source.metadata) if source.metadata else None
    return Example(identity(messages, found.expected), messages, found.expected, domain, kept)


def _metadata(where: str, row: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    missing = [key for key in keys if key not in row]
    if missing:
        what = f"no {' and no '.join(missing)} among its keys {sorted(map(str, row))}"
        raise UserError(what, where, "mend data.metadata_columns")
    kept = {key: row[key] for key in keys}
    try:
        metadata.dump(kept)
    except TypeError as error:
        raise UserError(f"its metadata cannot be kept: {error}", where, "write it as text") from error
    return kept


def _report(source: str, found: Counter[str], longest: int | None, some: bool) -> None:
    rows, long, blank = found["rows"], found["long"], found["blank"]
    if not some and long:
        what = f"no usable rows: of {rows}, {long} have prompts of more than {longest} tokens and {blank} are blank"
        raise UserError(what, source, "raise data.max_prompt_length and data.max_length")
    if not some:
        raise UserError(f"no usable rows: all {rows} are blank" if rows else "no rows", source, shapes.SHAPE)
    if blank or found["repeated"]:
        log.warning("%s: %d rows, left out %d blank and %d repeated ones", source, rows, blank, found["repeated"])
    if long:
        text = "%s: %d rows, left out %d whose prompts have more than data.max_prompt_length = %d tokens"
        log.warning(text, source, rows, long, longest)
    if found["strayed"]:
        log.warning("%s: %d of the repeated rows name another domain; the first one counts", source, found["strayed"])
