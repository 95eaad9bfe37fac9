"""What can be told of a vLLM engine's steps from the outputs that arrive: their sizes, and the time between them.

The engine runs in processes of its own and its statistics are off, which would make Python objects of every request. A
step lasts from the one before it, or from the first request after a pause; one that scores and generates is told as two
that share its time by tokens. It knows no vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from teacher_server.backends.steps import Kind, Observer, Step, nobody, note


@dataclass(eq=False)
class _Prompt:
    tokens: int
    step: Step | None = None


class Meter:
    """Is told of requests as they begin and of outputs as they arrive, all on the event loop."""

    def __init__(self) -> None:
        self.observer: Observer = nobody
        self.scored = False
        """Whether anything was scored since somebody last set it to False."""
        self.readout_s = 0.0
        """Seconds of reading out that no step has been told with yet; the next one that scores takes them."""
        self._prompts: dict[str, _Prompt] = {}
        self._open = 0
        self._last = time.time()

    @contextmanager
    def scoring(self, name: str, tokens: int) -> Iterator[None]:
        """A prompt that is read and not continued; notes the step that its last token was in."""
        prompt = self._prompts[name] = _Prompt(tokens)
        try:
            with self.generating():
                yield
        finally:
            del self._prompts[name]
            note(prompt.step)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Any request."""
        if not self._open:
            self._last = time.time()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1

    def arrived(self, outputs: Iterable[Any]) -> None:
        """The outputs of one step; each has `request_id`, our name with or without a tail, and `new_token_ids`."""
        now = time.time()
        began, self._last = self._last, now
        prompts: list[_Prompt] = []
        rows = tokens = 0
        for output in outputs:
            prompt = self._prompts.get(output.request_id.partition("-")[0])
            if prompt is not None:
                prompts.append(prompt)
            else:
                rows, tokens = rows + 1, tokens + len(output.new_token_ids)
        read = sum(prompt.tokens for prompt in prompts)
        share = (now - began) / (read + tokens) if read + tokens else 0.0
        if prompts:
            step = self._tell("score", len(prompts), read, began, share * read, alone=not tokens)
            for prompt in prompts:
                prompt.step = step
        if tokens:
            self._tell("generate", rows, tokens, began + share * read, share * tokens, alone=not prompts)

    def _tell(self, kind: Kind, sequences: int, tokens: int, began: float, seconds: float, *, alone: bool) -> Step:
        step = Step(kind, sequences, tokens, began, seconds, alone=alone)
        if kind == "score":
            self.scored = True
            step.readout_s, self.readout_s = self.readout_s, 0.0
        self.observer(step)
        return step
