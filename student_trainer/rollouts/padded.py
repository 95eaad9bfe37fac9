"""Samples with transformers' own generate, in batches padded on the left: for models that `continuous` cannot take.

A batch runs until its longest row has ended. The distribution is exactly softmax(logits / temperature) over the real
vocabulary: the token of each row is drawn here, by the row's own random numbers, and nothing that a model's own
generation configuration brings along has a say. Knows no teacher and no loss. Legend: B prompts, V logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from protos.scores import FinishReason, Ids

from .base import Rollout, check_finite, row_limits, row_seeds
from .draw import draw


class _Draws(LogitsProcessor):  # type: ignore[misc]
    """Draws each row's next token and leaves generate no other choice; keeps the log-probabilities."""

    def __init__(self, vocab_size: int, temperature: float, uniforms: Tensor | None) -> None:
        self.vocab_size, self.temperature, self.uniforms = vocab_size, temperature, uniforms
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = None if self.uniforms is None else self.uniforms[:, len(self.logprobs)]
        ids, logprobs = draw(scores[:, : self.vocab_size], uniform, self.temperature)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids[:, None], 0.0)


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


class PaddedEngine:
    """Batches of at most `slots` prompts, sorted by length so that little is padded.

    A model in shards must be whole (see sharding.whole).
    """

    name = "padded"

    def __init__(self, model: Any, *, vocab_size: int, eos_ids: Sequence[int], pad_id: int, slots: int) -> None:
        self.model, self.vocab_size, self.eos_ids, self.pad_id = model, vocab_size, tuple(eos_ids), pad_id
        self.slots = slots

    def sample(
        self,
        prompts: Sequence[Ids],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        max_length: int | None = None,
        logprobs: bool = False,
        rows: int | None = None,
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, Rollout]]:
        """See RolloutEngine."""
        limits, seeds = row_limits(prompts, max_new_tokens, max_length), row_seeds(prompts, seed, names)
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        size = rows or self.slots
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            numbers = None
            if temperature > 0:
                numbers = np.zeros((len(chosen), int(limits[chosen].max())))
                for row, i in enumerate(chosen):
                    numbers[row, : limits[i]] = np.random.default_rng(seeds[i]).random(int(limits[i]))
            batch = [prompts[i] for i in chosen]
            yield from zip(chosen, self._batch(batch, limits[chosen], temperature, numbers, logprobs), strict=True)

    def _batch(
        self,
        prompts: Sequence[Ids],
        limits: npt.NDArray[np.int64],
        temperature: float,
        numbers: npt.NDArray[np.float64] | None,
        logprobs: bool,
    ) -> list[Rollout]:
        model = self.model
        device = next(model.parameters()).device
        ids, mask = (torch.from_numpy(a).to(device) for a in pad_left(prompts, self.pad_id))
        uniforms = None if numbers is None else torch.from_numpy(numbers).to(device)
        draws = _Draws(self.vocab_size, temperature, uniforms)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=int(limits.max()),
            repetition_penalty=1.0,
            eos_token_id=list(self.eos_ids),
            pad_token_id=self.pad_id,
            use_cache=True,
        )
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                output = model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=config,
                    logits_processor=LogitsProcessorList([draws]),
                )
        finally:
            model.train(training)
        new = output[:, ids.shape[1] :].cpu().numpy()
        drawn = torch.stack(draws.logprobs[: new.shape[1]], 1).cpu().numpy()
        ends, stopped = cut_at_end(new, self.eos_ids, limits)
        rollouts = []
        for i, prompt in enumerate(prompts):
            numbers_of = drawn[i, : ends[i]].copy()
            check_finite(numbers_of)
            rollouts.append(
                Rollout(
                    prompt,
                    new[i, : ends[i]].astype(np.int32),
                    FinishReason.STOP if stopped[i] else FinishReason.LENGTH,
                    numbers_of if logprobs else None,
                )
            )
        return rollouts

    def update_weights(self) -> None:
        """Nothing: the model is the student."""

    def close(self) -> None:
        """Nothing is held between calls."""
