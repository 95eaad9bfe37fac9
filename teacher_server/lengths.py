"""How long completions turn out to be, as a share of the tokens that they may have, learned from those that ended.

Most end long before `max_tokens`; an engine that is given prompts as if all came to it stands half empty. It knows no
engine and no queue.
"""

from __future__ import annotations

import math

from protos.scores import Mode

WEIGHT = 1 / 32
"""What one more completion counts in the running mean."""


class Lengths:
    """One running mean for each mode; 1 until a completion has ended."""

    def __init__(self) -> None:
        self._share: dict[Mode | None, float] = {}

    def expected(self, mode: Mode | None, max_tokens: int) -> int:
        """New tokens of a completion that may have `max_tokens`, at least 1."""
        return max(1, math.ceil(self._share.get(mode, 1.0) * max_tokens))

    def observe(self, mode: Mode | None, tokens: int, max_tokens: int) -> None:
        """Takes in a completion that ended after `tokens`."""
        share = self._share.get(mode, 1.0)
        self._share[mode] = share + (tokens / max_tokens - share) * WEIGHT
