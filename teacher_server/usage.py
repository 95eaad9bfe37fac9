"""What each client has had so far, for metrics and pages: plain counts by client's name.

It knows no metric and no page. Where names are not known in advance there may be any number of them, so only the last
MOST_NAMES are kept apart; what older ones had is counted together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, fields

MOST_NAMES = 1024
OTHERS = "(others)"
"""Where the counts of clients go that are no longer kept apart."""


@dataclass
class Usage:
    """Of one client: calls by kind, those refused as too many, and tokens by where they came from."""

    score_calls: int = 0
    generate_calls: int = 0
    overloaded: int = 0
    scored_tokens: int = 0
    """Tokens of its sequences that the engine scored."""
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of its sequences whose scores were known, in memory or on the disk."""
    joined_tokens: int = 0
    """Tokens of its sequences that joined an equal one in flight."""


class UsageByClient:
    """Counts that start when a client is first named."""

    def __init__(self) -> None:
        self._usage: OrderedDict[str, Usage] = OrderedDict()
        self._others = Usage()

    def of(self, name: str) -> Usage:
        """The counts of a client, to add to."""
        usage = self._usage.get(name)
        if usage is None:
            usage = self._usage[name] = Usage()
            if len(self._usage) > MOST_NAMES:
                _, oldest = self._usage.popitem(last=False)
                for count in fields(Usage):
                    setattr(self._others, count.name, getattr(self._others, count.name) + getattr(oldest, count.name))
        self._usage.move_to_end(name)
        return usage

    def all(self) -> Mapping[str, Usage]:
        """The counts of every client, and of OTHERS where some are not kept apart."""
        others = {} if self._others == Usage() else {OTHERS: self._others}
        return {**self._usage, **others}
