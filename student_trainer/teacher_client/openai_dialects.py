"""What speaks to one kind of stock server: bodies of calls out of requests, results out of JSON.

Each is a pure translator: no connection, no retry. Legend: N tokens, T scored positions, K alternatives.
"""

from __future__ import annotations

from typing import Any, Protocol

from protos.scores import Floats, Ids, ScoreRequest
from student_trainer.teacher_client.openai_completions import Ask, Finished

Call = tuple[str, dict[str, Any]]
"""Path and JSON body of a POST."""
Row = tuple[Floats, Ids, Floats]
"""Of one sequence: float32[T] of its tokens, int32[T,K] and float32[T,K] of the top."""


class Dialect(Protocol):
    """One kind of stock server."""

    def score_call(self, request: ScoreRequest, served: str) -> Call:
        """The call that scores the request's sequences, at temperature 1."""
        ...

    def read_scores(self, answer: Any, request: ScoreRequest) -> list[Row]:
        """Its answer, in the request's order; TeacherFailed where it is another."""
        ...

    def generate_call(self, ask: Ask, served: str) -> Call:
        """The call that generates."""
        ...

    def read_completions(self, answer: Any, ask: Ask) -> list[Finished]:
        """Its answer: `ask.copies` completions of each prompt, prompt by prompt; Unsupported without token ids."""
        ...
