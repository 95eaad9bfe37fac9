"""Problems of reasoning-gym's tasks: `reasoning-gym:chain_sum,gcd?size=500&seed=1&chain_sum.max_terms=3`.

Each is made by the package from task, options, size and seed alone, and carries what its scorer needs (see
verifiers). Problem i of most tasks is a function of seed + i: seeds nearer than the size share problems. The package
comes with `pip install 'strong2weak[reasoning-gym]'`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from student_trainer.data import query
from student_trainer.errors import UserError, one_line

PREFIX = "reasoning-gym:"
SIZE, SEED = 500, 0
"""Problems of each task, and the seed, where the source does not say."""


def rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each problem with its place: `question`, `answer` (None where a task has no single one), `task`, `options`,
    `metadata`.

    Tasks take turns. A question that comes again is left out, so that no two parts of the rows share one; `size` counts
    before that.
    """
    names, size, options = _parse(source)
    seen: set[str] = set()
    made = [_task(source, name, size, options[name]) for name in names]
    for number, turn in enumerate(zip_longest(*made)):
        for name, entry in zip(names, turn, strict=True):
            if entry is not None and entry["question"] not in seen:
                seen.add(entry["question"])
                yield f"{PREFIX}{name}, problem {number}", {**entry, "task": name, "options": options[name]}


def _parse(source: str) -> tuple[list[str], int, dict[str, dict[str, Any]]]:
    """Tasks, problems of each, and every task's options with its seed."""
    from reasoning_gym.factory import DATASETS

    text, given = query.parse(source.removeprefix(PREFIX), source)
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names or [""]:
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(sorted(DATASETS))}"
            raise UserError(f"reasoning-gym has no task {name or 'without a name'}", source, hint)
    size, seed = given.pop("size", SIZE), given.pop("seed", SEED)
    for key, value, least in (("size", size, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UserError(f"{key} is {value}, not a whole number from {least} on", source, f"write {key}={least}")
    options: dict[str, dict[str, Any]] = {name: {"seed": seed} for name in names}
    for key, value in given.items():
        name, dot, option = key.partition(".")
        if name not in options or not dot:
            what = f"{key} is neither size, seed nor an option of one of its tasks"
            raise UserError(what, source, f"write {names[0]}.option=value for an option of {names[0]}")
        options[name][option] = value
    return names, size, options


def _task(source: str, name: str, size: int, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The problems of one task, made one after the other; its mistakes are told at once."""
    import reasoning_gym

    try:
        dataset = reasoning_gym.create_dataset(name, size=size, **options)
    except (TypeError, ValueError, AssertionError) as error:
        what = f"reasoning-gym refuses {name} with {options}: {one_line(str(error), 200) or type(error).__name__}"
        raise UserError(what, source, f"check the options of {name}") from error
    return (dataset[i] for i in range(size))
