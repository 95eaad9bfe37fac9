"""Options behind a name, as in a URL: `number?tolerance=0.01`, `reasoning-gym:gcd?size=100`. Knows no names."""

from __future__ import annotations

import json
from typing import Any

from student_trainer.errors import UserError


def parse(text: str, where: str) -> tuple[str, dict[str, Any]]:
    """The name before `?` and its options; a value is JSON (5, 0.1, true, [1, 2]), else text as it stands."""
    name, _, rest = text.partition("?")
    options: dict[str, Any] = {}
    for part in filter(None, rest.split("&")):
        key, equals, value = part.partition("=")
        if not (key and equals) or key in options:
            what = f"{key} is given twice" if key in options else f"{part} is no option"
            raise UserError(what, where, "write name?key=value&key=value")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return name, options
