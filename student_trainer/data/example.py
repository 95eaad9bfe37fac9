"""What a row of data becomes: a problem with the turns of its prompt. Knows no files and no shapes of rows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from protos.scores import Message


@dataclass(frozen=True, slots=True)
class Example:
    """A problem: the turns of its prompt, and what is expected (the record's output), where the data says so.

    `id` is a hash of both, stable over runs and machines.
    """

    id: str
    messages: tuple[Message, ...]
    expected: str | None = None
    domain: str | None = None
    """What the record's domain column says: it may choose the teacher, and is measured by itself."""
    metadata: Mapping[str, Any] | None = field(default=None, hash=False)
    """What else a verifier needs: data.metadata_columns of the row, or a reasoning-gym entry's metadata."""


def identity(messages: tuple[Message, ...], expected: str | None) -> str:
    """16 hexadecimal digits of a hash of prompt and expectation."""
    content = json.dumps([[(m.role, m.content) for m in messages], expected], ensure_ascii=True)
    return hashlib.sha256(content.encode("ascii")).hexdigest()[:16]
