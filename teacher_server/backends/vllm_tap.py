"""Keeps the log-probabilities of prompts that an engine sends as the tensors they are.

vLLM makes a Python object of each number, which takes seconds where the engine took milliseconds. `install` replaces
the one method that does so; requests whose caller wants vLLM's own objects are not served by this process.
Legend: N prompt tokens, K alternatives.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from teacher_server.backends.bits import to_bits
from teacher_server.backends.vllm_wire import Answer


class Kept:
    """The tensors of one prompt, in place of vLLM's list of dictionaries."""

    def __init__(self, tensors: Any) -> None:
        self._tensors = tensors

    def __len__(self) -> int:
        return len(self._tensors[1])

    def __bool__(self) -> bool:
        return True

    def answer(self) -> Answer:
        """What our scorer put into them, without copying."""
        return Answer(*self.alternatives(), to_bits(self._tensors[2]))

    def alternatives(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Ids and numbers, without copying; beside these the engine's own answers have ranks."""
        return self._tensors[0].numpy(), self._tensors[1].numpy()


def install() -> bool:
    """Whether the method was there to replace; doing it twice is harmless."""
    from vllm.v1.engine.logprobs import LogprobsProcessor

    if not hasattr(LogprobsProcessor, "_update_prompt_logprobs"):
        return False

    def keep(self: Any, tensors: Any) -> None:
        self.prompt_logprobs = Kept(tensors)

    LogprobsProcessor._update_prompt_logprobs = keep
    return True


def alternatives(prompt_logprobs: Any) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """int32[N-1,K+1] ids and float32[N-1,K+1] of an engine's own answer, the realised token first.

    `prompt_logprobs` is a `Kept` or vLLM's FlatLogprobs; ValueError for anything else.
    """
    if isinstance(prompt_logprobs, Kept):
        return prompt_logprobs.alternatives()
    ids = getattr(prompt_logprobs, "token_ids", None)
    if ids is None or len(prompt_logprobs) < 2:
        raise ValueError(f"the engine gave {type(prompt_logprobs).__name__} where log-probabilities were expected")
    rows = len(prompt_logprobs) - 1  # position 0 has none
    width = len(ids) // rows
    numbers = np.array(prompt_logprobs.logprobs, dtype=np.float32).reshape(rows, width)
    return np.array(ids, dtype=np.int32).reshape(rows, width), numbers
