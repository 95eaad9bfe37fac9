"""The completions of one piece of a Generate call, collected over as many attempts as it takes.

It knows neither transports nor retries. Completions that have ended stay; what is missing is asked for again.
Legend: P prompt tokens, R new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from protos import errors
from protos.scores import Completion, CompletionDelta, GenerateRequest, Prompt, Sampling
from student_trainer.teacher_client.splitting import prompt_size

Slot = tuple[int, int]


class PieceCollector:
    """Completions of `prompts`, `n` each; `prompt_indexes` and `first_sample` are their places in the caller's list."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prompt_indexes: Sequence[int],
        n: int,
        first_sample: int,
        deliver: Callable[[int, int, Completion], None],
    ) -> None:
        self.prompt_indexes = prompt_indexes
        self._prompts, self._n, self._first_sample, self._deliver = prompts, n, first_sample, deliver
        self._done: set[Slot] = set()
        self._asked: list[int] = []

    @property
    def finished(self) -> int:
        """Completions that have ended."""
        return len(self._done)

    def tokens(self, max_tokens: int) -> int:
        """An upper bound of the tokens of all prompts and completions."""
        return sum(prompt_size(p) for p in self._prompts) + max_tokens * len(self._prompts) * self._n

    @property
    def asked_indexes(self) -> list[int]:
        """The caller's indexes of the prompts of the last request."""
        return [self.prompt_indexes[i] for i in self._asked]

    def request(self, sampling: Sampling, logprobs: bool, fingerprint: str) -> GenerateRequest:
        """The call for the prompts that miss completions."""
        missing = (i for i in range(len(self._prompts)) if any((i, s) not in self._done for s in range(self._n)))
        self._asked = list(missing)
        prompts = tuple(self._prompts[i] for i in self._asked)
        return GenerateRequest(prompts, sampling, self._n, logprobs, stream=False, fingerprint=fingerprint)

    def collect(self, stream: Iterable[list[CompletionDelta]]) -> None:
        """Takes the answer to the last request; TeacherFailed where completions are missing at its end."""
        parts: dict[Slot, list[CompletionDelta]] = {}
        for deltas in stream:
            for delta in deltas:
                if not (delta.prompt_index < len(self._asked) and delta.sample_index < self._n):
                    raise errors.TeacherFailed(
                        f"the stream is broken: no completion {delta.prompt_index} was asked for"
                    )
                slot = self._asked[delta.prompt_index], delta.sample_index
                parts.setdefault(slot, []).append(delta)
                if delta.finish_reason is not None and slot not in self._done:
                    self._done.add(slot)
                    completion = _join(parts.pop(slot))
                    self._deliver(self.prompt_indexes[slot[0]], self._first_sample + slot[1], completion)
        missing = len(self._prompts) * self._n - self.finished
        if missing:
            raise errors.TeacherFailed(f"the stream is broken: it ended with {missing} completions missing")


def _join(parts: list[CompletionDelta]) -> Completion:
    """The finished completion of its pieces."""
    logprobs = [p.logprobs for p in parts if p.logprobs is not None]
    prompt = next((p.prompt_token_ids for p in parts if p.prompt_token_ids is not None), None)
    finish = parts[-1].finish_reason
    assert finish is not None
    return Completion(
        prompt_token_ids=np.zeros(0, np.int32) if prompt is None else prompt,
        token_ids=np.concatenate([p.token_ids for p in parts]),
        text="".join(p.text for p in parts),
        finish_reason=finish,
        logprobs=np.concatenate(logprobs) if logprobs else None,
    )
