"""A row's metadata as JSON text and back, with what JSON has not: tuples, sets, and keys that are no text.

reasoning-gym's scorers compare with tuples and look up numbers, so these must come back as what they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

KIND = "__kind__"
"""The key of an object that stands for something else."""


def dump(metadata: Mapping[str, Any] | None) -> str | None:
    """The text of it, None for None; TypeError naming the type of what cannot be written."""
    return None if metadata is None else json.dumps(_plain(metadata), ensure_ascii=False, allow_nan=True)


def load(text: str | None) -> dict[str, Any] | None:
    """What `dump` wrote."""
    if text is None:
        return None
    found: dict[str, Any] = json.loads(text, object_hook=_restore)
    return found


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str, int, float)):
        return value
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, tuple):
        return {KIND: "tuple", "items": [_plain(v) for v in value]}
    if isinstance(value, (set, frozenset)):
        return {KIND: "set", "items": [_plain(v) for v in sorted(value, key=repr)]}
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value) and KIND not in value:
            return {key: _plain(v) for key, v in value.items()}
        return {KIND: "map", "items": [[_plain(k), _plain(v)] for k, v in value.items()]}
    raise TypeError(f"{type(value).__name__} has no form in JSON")


def _restore(value: dict[str, Any]) -> Any:
    kind = value.get(KIND)
    if kind == "tuple":
        return tuple(value["items"])
    if kind == "set":
        return set(value["items"])
    if kind == "map":
        return dict(value["items"])
    return value
