"""What a score asks of a vLLM worker and what comes back, in the two places that vLLM leaves for it.

The question travels in `SamplingParams.extra_args`, the answer as the three tensors of a prompt's log-probabilities,
which the engine carries from its worker to this process without making Python objects of them. Knows numpy, no engine.
Legend: T scored positions, K alternatives, C candidates, M temperatures, H hidden width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protos.scores import Field, Ids, Scores, ScoreSpec, Sequence

KEY = "strong2weak"
"""Name of the question among a request's extra arguments."""
FINITE = "finite"
"""A column beside hidden states: 0 where all of the row are finite, else NaN."""


@dataclass(frozen=True, eq=False)
class Question:
    """What a worker computes about one prompt.

    Positions `score_start`.. of its tokens; `candidate_ids` int32[T,C] or None; `plain` asks for the slow, obvious way,
    which the self-check compares with.
    """

    score_start: int
    spec: ScoreSpec
    fields: frozenset[Field]
    candidate_ids: Ids | None = None
    plain: bool = False

    @staticmethod
    def about(sequence: Sequence, spec: ScoreSpec, *, plain: bool = False) -> Question:
        """The question whose answer is the score of `sequence`."""
        fields = spec.fields(sequence.candidates)
        candidates = sequence.candidate_ids if Field.CANDIDATE_LOGPROBS in fields else None
        return Question(sequence.score_start, spec, fields, candidates, plain)

    @property
    def candidates(self) -> int:
        """C."""
        return 0 if self.candidate_ids is None else int(self.candidate_ids.shape[1])

    def extra_args(self) -> dict[str, Any]:
        """The question in msgpack's types."""
        ids = self.candidate_ids
        asked = {
            "start": self.score_start,
            "top_k": self.spec.top_k,
            "temperatures": list(self.spec.temperatures),
            "fields": sorted(field.value for field in self.fields),
            "candidates": b"" if ids is None else ids.tobytes(),
            "columns": self.candidates,
            "plain": self.plain,
        }
        return {KEY: asked}

    @staticmethod
    def read(extra_args: Mapping[str, Any] | None) -> Question | None:
        """The question of a request; None where it has none."""
        asked = (extra_args or {}).get(KEY)
        if asked is None:
            return None
        ids = np.frombuffer(asked["candidates"], dtype=np.int32).reshape(-1, max(1, asked["columns"]))
        return Question(
            score_start=asked["start"],
            spec=ScoreSpec(asked["top_k"], tuple(asked["temperatures"])),
            fields=frozenset(map(Field, asked["fields"])),
            candidate_ids=ids if asked["columns"] else None,
            plain=asked["plain"],
        )

    @property
    def columns(self) -> list[tuple[str, int]]:
        """(field, width) of the float32 columns of an answer, in order."""
        m = len(self.spec.temperatures)
        widths = (
            (Field.TOKEN_LOGPROBS, "token_logprobs", 1),
            (Field.TOP, "top_logprobs", self.spec.top_k),
            (Field.CANDIDATE_LOGPROBS, "candidate_logprobs", self.candidates),
            (Field.LOG_NORMALIZER, "log_normalizer", m),
            (Field.TAIL_LOGPROB, "tail_logprob", m),
            (Field.HIDDEN_STATES, FINITE, 1),
        )
        return [(name, width) for field, name, width in widths if field in self.fields]

    @property
    def id_columns(self) -> int:
        """K where the top was asked for, else 0."""
        return self.spec.top_k if Field.TOP in self.fields else 0


class Answer(NamedTuple):
    """int32[T,K], float32[T, sum of widths], and the hidden states' bits uint16[T,H] or float32[T,H] (or empty)."""

    ids: npt.NDArray[Any]
    numbers: npt.NDArray[Any]
    states: npt.NDArray[Any]

    def scores(self, question: Question) -> Scores:
        """The fields of the answer, each with memory of its own; ValueError where hidden states are not finite."""
        arrays: dict[str, Any] = {}
        first = 0
        for name, width in question.columns:
            part = self.numbers[:, first : first + width]
            first += width
            if name == FINITE:
                if not np.isfinite(part).all():
                    raise ValueError("the engine gave hidden states that are not finite")
                continue
            arrays[name] = np.ascontiguousarray(part[:, 0] if name == "token_logprobs" else part, dtype=np.float32)
        if question.id_columns:
            arrays["top_token_ids"] = np.ascontiguousarray(self.ids, dtype=np.int32)
        if Field.HIDDEN_STATES in question.fields:
            arrays["hidden_states"] = np.array(self.states)
        return Scores(**arrays)
