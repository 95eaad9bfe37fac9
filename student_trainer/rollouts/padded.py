"""Samples completions from the student with `transformers`' own generate.

One call takes prompts of any lengths and modes, pads them on the left and samples them together with a KV cache. The
distribution is exactly softmax(logits / temperature) over the real vocabulary: no top_p, no top_k, nothing that a
model's own generation configuration brings along. Knows no teacher and no loss. Legend: B prompts, P prompt tokens, R
new tokens, V logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from protos.scores import FinishReason, Ids

from .base import Rollout


class _Sampler(LogitsProcessor):  # type: ignore[misc]
    """Masks ids outside the real vocabulary, applies the temperature, and records log-probabilities where asked.

    The token that was drawn at a step is the last one of the next step's ids, so one [B, V] array is held, not R of
    them.
    """

    def __init__(self, vocab_size: int, temperature: float, record: bool) -> None:
        self.vocab_size, self.temperature, self.record = vocab_size, temperature, record
        self.last: torch.Tensor | None = None
        self.logprobs: list[torch.Tensor] = []

    def take(self, last_ids: torch.Tensor) -> None:
        """Keeps the log-probabilities of the tokens [B] that the previous step drew."""
        if self.last is not None:
            self.logprobs.append(self.last.gather(1, last_ids[:, None])[:, 0])

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.shape[1] > self.vocab_size:
            scores[:, self.vocab_size :] = -torch.inf
        if self.temperature not in (0, 1):
            scores = scores / self.temperature
        if self.record:
            self.take(input_ids[:, -1])
            self.last = scores.log_softmax(-1)
        return scores


def pad_left(prompts: Sequence[Ids], pad_id: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Ids and attention mask int64[B, max P] of prompts, padded on the left."""
    lengths = np.fromiter((len(p) for p in prompts), np.int64, len(prompts))
    mask = np.arange(lengths.max()) >= (lengths.max() - lengths)[:, None]
    ids = np.full(mask.shape, pad_id, np.int64)
    ids[mask] = np.concatenate(prompts)
    return ids, mask.astype(np.int64)


def cut_at_end(
    tokens: npt.NDArray[np.int64], eos_ids: Sequence[int], limits: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Lengths int64[B] of rows of new tokens, up to and with the first end token, and whether each row has one.

    `limits` int64[B] is the largest length of each row; a row that reaches it first is truncated and has no end.
    """
    ends = np.isin(tokens, np.asarray(eos_ids, np.int64))
    first = np.where(ends.any(1), ends.argmax(1) + 1, tokens.shape[1] + 1)
    stopped = first <= limits
    return np.minimum(np.where(stopped, first, limits), tokens.shape[1]), stopped


def sample(
    model: Any,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    temperature: float,
    vocab_size: int,
    eos_ids: Sequence[int],
    pad_id: int,
    max_length: int | None = None,
    seed: int | None = None,
    logprobs: bool = False,
    synced_gpus: bool = False,
) -> list[Rollout]:
    """One completion for each prompt, in the order given; `temperature` 0 is greedy.

    `max_length` bounds prompt and completion together. `seed` makes the draw repeatable and leaves the global random
    state alone. `synced_gpus` keeps the processes of a sharded model in step. Prompts must be shorter than
    `max_length`.
    """
    lengths = np.fromiter((len(p) for p in prompts), np.int64, len(prompts))
    limits = np.full(len(prompts), max_new_tokens, np.int64)
    if max_length is not None:
        limits = np.minimum(limits, max_length - lengths)
    assert limits.min() >= 1, "a prompt leaves no room for a completion"
    ids, mask = pad_left(prompts, pad_id)
    device = next(model.parameters()).device
    sampler = _Sampler(vocab_size, temperature, logprobs)
    config = GenerationConfig(
        do_sample=temperature > 0,
        max_new_tokens=int(limits.max()),
        temperature=1.0,
        top_p=1.0,
        top_k=0 if temperature > 0 else 50,
        repetition_penalty=1.0,
        eos_token_id=list(eos_ids),
        pad_token_id=pad_id,
        use_cache=True,
    )
    training = model.training
    model.eval()
    devices = [device] if device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices, enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = model.generate(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=torch.from_numpy(mask).to(device),
            generation_config=config,
            logits_processor=LogitsProcessorList([sampler]),
            synced_gpus=synced_gpus,
        )
    model.train(training)
    new = output[:, ids.shape[1] :].cpu().numpy()
    drawn = None
    if logprobs:
        sampler.take(output[:, -1])
        drawn = torch.stack(sampler.logprobs, 1).cpu().numpy()
    ends, stopped = cut_at_end(new, eos_ids, limits)
    return [
        Rollout(
            prompt,
            new[i, : ends[i]].astype(np.int32),
            FinishReason.STOP if stopped[i] else FinishReason.LENGTH,
            None if drawn is None else drawn[i, : ends[i]].copy(),
        )
        for i, prompt in enumerate(prompts)
    ]


def sample_sorted(model: Any, prompts: Sequence[Ids], *, rows: int, **options: Any) -> list[Rollout]:
    """`sample` in batches of at most `rows` prompts, sorted by length so that little is padded; the order given."""
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    found: list[Rollout | None] = [None] * len(prompts)
    for first in range(0, len(order), rows):
        batch = order[first : first + rows]
        for i, rollout in zip(batch, sample(model, [prompts[i] for i in batch], **options), strict=True):
            found[i] = rollout
    return [r for r in found if r is not None]
