"""Completions of a stock server as the pieces that the client collects: one piece each, because it is no stream.

Knows neither a route nor an engine's shapes. Legend: P prompt tokens, R new tokens.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from protos import errors
from protos.scores import CompletionDelta, FinishReason, Floats, GenerateRequest, Ids, Prompt, ids_array
from student_trainer.teacher_client.openai_model import StockModel


@dataclass(frozen=True)
class Ask:
    """A call of Generate as these servers take it: prompts as lists of ids, and every id that ends a completion."""

    prompts: list[list[int]]
    stop_ids: tuple[int, ...]
    request: GenerateRequest

    @property
    def copies(self) -> int:
        """Samples that the server is asked for: greedy ones are all the same, and vLLM refuses more than one."""
        return 1 if self.request.sampling.temperature == 0 else self.request.n

    @property
    def sampling(self) -> dict[str, Any]:
        """What servers call alike. Every parameter is named, because their defaults are those of the model's files."""
        asked = self.request.sampling
        return {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k or -1,
            "min_p": 0,
            "repetition_penalty": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "stop_token_ids": list(self.stop_ids),
            "ignore_eos": asked.ignore_eos,
        }


def ask_of(request: GenerateRequest, model: StockModel, address: str) -> Ask:
    """The call; InvalidSequence for ids outside the vocabulary, Unsupported for what no stock server has.

    The student's end ids go along as stop ids, so that completions end there whatever the server's own are.
    """
    sampling = request.sampling
    if sampling.max_thinking_tokens:
        raise errors.Unsupported(
            f"{address} has no max_thinking_tokens (got {sampling.max_thinking_tokens}): it is no strong2weak teacher"
        )
    ends: set[int] = set() if sampling.ignore_eos else set(model.eos_token_ids)
    prompts = [_ids(index, prompt, model, address) for index, prompt in enumerate(request.prompts)]
    return Ask(prompts, tuple(sorted(ends | set(sampling.stop_token_ids))), request)


def _ids(index: int, prompt: Prompt, model: StockModel, address: str) -> list[int]:
    if prompt.messages:
        raise errors.Unsupported(f"{address} takes token ids or text; render the messages of prompt {index} first")
    ids = ids_array(model.encode(prompt.text)) if prompt.token_ids is None else prompt.token_ids
    check_ids(ids, model, f"prompt {index}", index)
    return list(ids.tolist())


def check_ids(ids: Ids, model: StockModel, what: str, index: int) -> None:
    """InvalidSequence for ids outside the vocabulary, which some servers compute with instead of refusing them."""
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= model.vocab_size):
        raise errors.InvalidSequence(
            f"{what} has the token id {ids.min() if ids.min() < 0 else ids.max()}, the vocabulary has "
            f"{model.vocab_size} tokens",
            index=index,
        )


@dataclass(frozen=True)
class Finished:
    """One completion as a server tells it. `reason` is stop or length; `stopped_by` the id that stopped it, where the
    server says so; `logprobs` float32[R] at temperature 1.
    """

    ids: Ids
    text: str
    reason: str
    stopped_by: int | None = None
    logprobs: Floats | None = None


def deltas(ask: Ask, found: Sequence[Finished]) -> list[CompletionDelta]:
    """Pieces of `found`, which has `ask.copies` completions of each prompt, prompt by prompt."""
    copies, n = ask.copies, ask.request.n
    if len(found) != copies * len(ask.prompts):
        wanted = copies * len(ask.prompts)
        raise errors.TeacherFailed(f"the server gave {len(found)} completions, {wanted} were asked for")
    return [
        _delta(ask, prompt, sample, found[prompt * copies + sample % copies])
        for prompt in range(len(ask.prompts))
        for sample in range(n)
    ]


def _delta(ask: Ask, prompt: int, sample: int, one: Finished) -> CompletionDelta:
    if one.reason not in ("stop", "length"):
        raise errors.TeacherFailed(f"the server ended a completion of prompt {prompt} with the reason {one.reason!r}")
    ids, logprobs = one.ids, one.logprobs
    if one.reason == "stop":
        _check_end(ids, one.stopped_by, ask.stop_ids)
    if logprobs is not None and len(logprobs) != len(ids):
        raise errors.TeacherFailed(f"the server gave {len(logprobs)} log-probabilities for {len(ids)} tokens")
    prompt_ids = ids_array(ask.prompts[prompt])
    reason = FinishReason(one.reason)
    return CompletionDelta(prompt, sample, ids, logprobs, one.text, reason, prompt_token_ids=prompt_ids)


def _check_end(ids: Ids, stopped_by: int | None, stop_ids: Collection[int]) -> None:
    """A completion that stopped has its stop id last, and it is one that the student stops at too."""
    last = int(ids[-1]) if len(ids) else None
    if last in stop_ids:
        return
    if stopped_by is not None and stopped_by != last:
        raise errors.TeacherFailed(f"the server left out the id {stopped_by} with which a completion ended")
    raise errors.TeacherMismatch(
        f"the server ended a completion with the token id {last}, the student's completions end with "
        f"{sorted(stop_ids)}; give both models the same eos_token_id in generation_config.json"
    )


def floats(values: Sequence[float | None]) -> Floats:
    """float32[R]; TeacherFailed where one is missing."""
    if any(value is None for value in values):
        raise errors.TeacherFailed("the server left out the log-probability of a sampled token")
    return np.asarray(values, np.float32)
