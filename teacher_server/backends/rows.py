"""One completion while it grows: its tokens, its random numbers, when it ends. Knows no tensor and no batch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from protos.scores import FinishReason, Floats, Ids, Sampling
from teacher_server.backends.base import Piece
from teacher_server.backends.jobs import GenerateJob
from teacher_server.backends.randomness import uniforms
from teacher_server.backends.thinking import ThinkBudget


def stop_ids(sampling: Sampling, eos: Iterable[int]) -> frozenset[int]:
    """Ids that end a completion; `eos` are the model's."""
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else frozenset(eos))


def most_tokens(sampling: Sampling, prompt_tokens: int, longest: int) -> int:
    """The largest number of new tokens, where prompt and completion may have `longest` together."""
    return max(1, min(sampling.max_tokens, longest - prompt_tokens))


class Row:
    """The completion `sample_index` of a job; `eos` are the model's ids, `max_tokens` bounds prompt and completion."""

    def __init__(self, job: GenerateJob, sample_index: int, eos: frozenset[int], max_tokens: int) -> None:
        sampling = job.sampling
        self.job = job
        self.sample_index = sample_index
        self.ended = False
        self._stops = stop_ids(sampling, eos)
        self._most = most_tokens(sampling, len(job.prompt_ids), max_tokens)
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top: list[tuple[Ids, Floats]] = []
        self._uniforms = uniforms(sampling.seed, job.prompt_ids, sample_index)
        self.budget: ThinkBudget | None = None
        if sampling.max_thinking_tokens and job.tags is not None:
            self.budget = ThinkBudget.after(job.prompt_ids, job.tags, sampling.max_thinking_tokens)
        self._sent = 0

    @property
    def fresh(self) -> bool:
        """Whether it has no token yet."""
        return not self._tokens

    @property
    def length(self) -> int:
        """Tokens of the prompt and the completion so far."""
        return len(self.job.prompt_ids) + len(self._tokens)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longest completion that it may have."""
        return len(self.job.prompt_ids) + self._most

    def context(self) -> Ids:
        """int32[length]: all its tokens so far."""
        return np.concatenate([self.job.prompt_ids, np.array(self._tokens, dtype=np.int32)])

    def uniform(self) -> float:
        """The next random number in [0, 1)."""
        return next(self._uniforms)

    def forced(self) -> int:
        """The id that must come next, or -1 for any."""
        return -1 if self.budget is None else self.budget.forced()

    @property
    def unwanted(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.job.cancelled or self.sample_index in self.job.dropped

    def record(self, token: int, logprob: float, top: tuple[Ids, Floats] | None = None) -> Piece | None:
        """Appends a token, with its alternatives int32[K] and float32[K]; the piece that is to be seen now, if any."""
        self._tokens.append(token)
        self._logprobs.append(logprob)
        if top is not None:
            self._top.append(top)
        if self.budget is not None:
            self.budget.observe(token)
        reason = None
        if token in self._stops:
            reason = FinishReason.STOP
        elif len(self._tokens) >= self._most:
            reason = FinishReason.LENGTH
        self.ended = reason is not None
        if not (self.ended or self.job.stream):
            return None
        first, self._sent = self._sent, len(self._tokens)
        new = self._top[first:]
        return Piece(
            self.sample_index,
            np.array(self._tokens[first:], dtype=np.int32),
            np.array(self._logprobs[first:], dtype=np.float32) if self.job.logprobs else None,
            reason,
            np.stack([ids for ids, _ in new]) if new else None,
            np.stack([numbers for _, numbers in new]) if new else None,
        )
