"""Where a stage's time went, from its metrics."""

from __future__ import annotations

from collections.abc import Iterable

from ..history import Line

PARTS = (
    ("sampling", "sampling"),
    ("teacher", "waiting for the teacher"),
    ("training", "training"),
    ("saving", "saving"),
    ("measuring", "measuring"),
)
"""Name in the metrics and name for people."""


def time_spent(lines: Iterable[Line]) -> dict[str, float]:
    """Seconds by the names of PARTS. What an interruption threw away is not in it."""
    spent = dict.fromkeys((name for name, _ in PARTS), 0.0)
    for line in lines:
        for name in spent:
            spent[name] += line.get("steps", 0) * line.get(f"seconds_{name}", 0.0)
        spent["saving"] += line.get("saving", 0.0)
        spent["measuring"] += line.get("eval_seconds", 0.0)
    return spent
