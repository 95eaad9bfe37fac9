"""The text of a completion that grows, under the rules of OpenAI's routes: stop strings, stop ids, reasoning apart.

It knows a decoder of ids and no model. What might be the beginning of a stop string is held back until it is known not
to be one. Think tags are found by their ids, never by their letters. Legend: R new tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

import numpy as np

from protos.scores import FinishReason, Ids, TextRules
from teacher_server.detokenizer import Detokenizer


class _Part(Enum):
    CONTENT = "content"
    REASONING = "reasoning"
    TAG = "tag"


@dataclass(frozen=True)
class Grown:
    """What some new tokens gave: text and reasoning, how many tokens count, and the stop string that ended it."""

    text: str
    reasoning: str = ""
    reasoning_tokens: int = 0
    tokens: int = 0
    stop: str = ""


class GrownText:
    """One completion's text after int32[P]; `think_ids` are the opening and the closing tag, or nothing."""

    def __init__(
        self, decode: Callable[[Ids], str], rules: TextRules, prompt_ids: Ids, think_ids: tuple[int, ...]
    ) -> None:
        self._rules = rules
        self._tags = dict(zip(think_ids, (_Part.REASONING, _Part.CONTENT), strict=True)) if len(think_ids) == 2 else {}
        if not rules.reasoning_apart:
            self._tags = {}
        self._decode = decode
        self._detokenizer = Detokenizer(decode)
        self._part = _Part.CONTENT
        if self._tags:
            seen = prompt_ids[np.isin(prompt_ids, tuple(self._tags))]
            self._part = self._tags[int(seen[-1])] if len(seen) else _Part.CONTENT
        self._held = ""
        self._parts: deque[tuple[_Part, int]] = deque()
        """Whose text the held characters are, in order."""

    def add(self, ids: Ids, reason: FinishReason | None) -> Grown:
        """What int32[R] more tokens give; `reason` where they are the last ones."""
        texts: dict[_Part, list[str]] = {part: [] for part in _Part}
        thoughts = tokens = 0
        for some in self._cut(ids):
            tokens += len(some)
            last = reason if tokens == len(ids) else None
            thoughts += self._read(some, last)
            found = self._find()
            if found is not None:
                stop, end = found
                self._take(end if self._rules.show_stop else end - len(stop), texts)
                return self._grown(texts, thoughts, tokens, stop)
            self._take(len(self._held) - (0 if last else self._maybe()), texts)
        return self._grown(texts, thoughts, tokens, "")

    def _cut(self, ids: Ids) -> list[Ids]:
        """Runs of tokens that can be read at once: each one alone where it may complete a stop string, or is a tag."""
        if self._rules.stop:
            return np.split(ids, np.arange(1, len(ids)))
        at = np.flatnonzero(np.isin(ids, tuple(self._tags))) if self._tags else np.empty(0, np.int64)
        return [run for run in np.split(ids, np.union1d(at, at + 1)) if len(run)]

    def _grown(self, texts: dict[_Part, list[str]], thoughts: int, tokens: int, stop: str) -> Grown:
        return Grown("".join(texts[_Part.CONTENT]), "".join(texts[_Part.REASONING]), thoughts, tokens, stop)

    def _read(self, ids: Ids, reason: FinishReason | None) -> int:
        """Puts the text of a run of tokens behind what is held; how many of them are reasoning."""
        if reason is FinishReason.STOP and not self._rules.show_stop:
            ids = ids[:-1]  # what is last is a stop id
            self._hold(self._detokenizer.add(ids, last=True), self._part)
            return len(ids) if self._part is _Part.REASONING else 0
        opened = self._tags.get(int(ids[0]))
        text = self._detokenizer.add(ids, last=reason is not None)
        if opened is None:
            self._hold(text, self._part)
            return len(ids) if self._part is _Part.REASONING else 0
        tag = self._decode(ids)
        self._hold(text.removesuffix(tag), self._part)
        self._hold(tag if text.endswith(tag) else "", _Part.TAG)
        self._part = opened
        return 0

    def _hold(self, text: str, part: _Part) -> None:
        if text:
            self._held += text
            self._parts.append((part, len(text)))

    def _find(self) -> tuple[str, int] | None:
        """The stop string that is complete first, and where it ends among what is held."""
        ends = [
            (at + len(stop), order) for order, stop in enumerate(self._rules.stop) if (at := self._held.find(stop)) >= 0
        ]
        if not ends:
            return None
        end, order = min(ends)
        return self._rules.stop[order], end

    def _maybe(self) -> int:
        """Characters at the end of what is held that may be the beginning of a stop string."""
        longest = max((len(stop) for stop in self._rules.stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-length:]) for stop in self._rules.stop):
                return length
        return 0

    def _take(self, length: int, texts: dict[_Part, list[str]]) -> None:
        """Moves the first characters of what is held to their parts."""
        text, self._held = self._held[:length], self._held[length:]
        while text:
            part, size = self._parts.popleft()
            if size > len(text):
                self._parts.appendleft((part, size - len(text)))
            texts[part].append(text[:size])
            text = text[size:]
