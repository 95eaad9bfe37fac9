"""Samples with a fixed number of slots: where a completion ends, the next prompt begins, and nothing waits for the
longest row of a batch.

transformers has a continuous batching of its own; docs/rollouts.md says why this one is here, and what it gains:
1.4 to 2.3 times the tokens a second of padded batches (`benchmarks/rollouts.py`). One forward pass at a time: prompts
that fill free slots, or the next token of every slot. Knows the model's forward pass and its cache, no teacher and no
loss. Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from protos.scores import FinishReason, Ids

from . import slots as slot_cache
from .base import Rollout, check_finite, row_limits, row_seeds
from .draw import draw
from .padded import pad_left

PREFILL_TOKENS = 16384
"""Largest number of prompt tokens of one forward pass, padding included, beyond a first prompt."""


class ContinuousEngine:
    """Samples from `model` itself, so every change of its weights counts at once.

    Keys and values take at most `slots` times the longest prompt and completion. A model in shards must be whole (see
    sharding.whole).
    """

    name = "continuous"

    def __init__(self, model: Any, *, vocab_size: int, eos_ids: Sequence[int], pad_id: int, slots: int) -> None:
        self.model, self.vocab_size, self.eos_ids, self.pad_id = model, vocab_size, tuple(eos_ids), pad_id
        self.slots = slots

    @staticmethod
    def suits(model: Any) -> bool:
        """Whether `model` has full attention in every layer and takes positions."""
        takes = inspect.signature(_causal(model).forward).parameters
        return {"position_ids", "attention_mask", "logits_to_keep"} <= takes.keys() and slot_cache.fits(model.config)

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
        limits, slots = row_limits(prompts, max_new_tokens, max_length), min(rows or self.slots, len(prompts))
        batch = _Batch(self, prompts, limits, temperature, row_seeds(prompts, seed, names), slots)
        while batch.running or batch.waiting:
            yield from batch.advance(logprobs)

    def update_weights(self) -> None:
        """Nothing: the model is the student."""

    def close(self) -> None:
        """Nothing is held between calls."""


class _Batch:
    """The rows of one `sample`: those that wait, and those in slots, which are the first `len(running)` ones."""

    def __init__(
        self,
        engine: ContinuousEngine,
        prompts: Sequence[Ids],
        limits: np.ndarray[Any, np.dtype[np.int64]],
        temperature: float,
        seeds: Sequence[np.random.SeedSequence],
        slots: int,
    ) -> None:
        self.engine, self.model, self.prompts, self.limits = engine, engine.model, prompts, limits
        self.temperature = temperature
        self.device = device = next(engine.model.parameters()).device
        self.waiting, self.running = deque(range(len(prompts))), list[int]()
        self.idle = len(prompts)
        """Slots left free so far, summed over passes: prompts are read when that has cost as much as one more pass."""
        self.seeds = seeds
        self.slots = slots
        most = int(limits.max()) if slots else 0
        self.cache: slot_cache.SlotCache | None = None
        self.positions = np.zeros(slots, np.int64)
        self.longest = max((len(p) + int(n) for p, n in zip(prompts, limits, strict=True)), default=0)
        self.eos = torch.tensor(engine.eos_ids, device=device)
        self.counts, self.most = (torch.zeros(slots, dtype=torch.long, device=device) for _ in range(2))
        self.drawn = torch.zeros(slots, most, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(slots, most, device=device)
        self.uniforms = torch.zeros(slots, most if temperature > 0 else 0, dtype=torch.float64, device=device)
        takes = inspect.signature(_causal(self.model).forward).parameters
        self.cache_name = "cache" if "cache" in takes else "past_key_values"  # renamed in transformers 5.24

    @torch.no_grad()
    def advance(self, logprobs: bool) -> list[tuple[int, Rollout]]:
        """One forward pass; the rows that ended with it."""
        training = self.model.training
        if training:
            self.model.eval()
        try:
            free = self.slots - len(self.running)
            self.idle += free
            if self.waiting and self.idle >= self.slots:
                states, self.idle = self._read(free), 0
            else:
                states = self._step()
        finally:
            if training:
                self.model.train()
        return self._leave(states, logprobs)

    def _forward(self, ids: Tensor, **options: Any) -> Tensor:
        """Logits [B, V] of the last position."""
        logits: Tensor = self.model(input_ids=ids, logits_to_keep=1, **options).logits
        return logits[:, -1, : self.engine.vocab_size]

    def _read(self, free: int) -> np.ndarray[Any, np.dtype[np.int8]]:
        """Reads the prompts of as many waiting rows as fit, into slots after the running ones."""
        chosen: list[int] = []
        width = 0
        while self.waiting and len(chosen) < free:
            width = max(width, len(self.prompts[self.waiting[0]]))
            if chosen and width * (len(chosen) + 1) > PREFILL_TOKENS:
                break
            chosen.append(self.waiting.popleft())
        ids, mask = (
            torch.from_numpy(a).to(self.device) for a in pad_left([self.prompts[i] for i in chosen], self.engine.pad_id)
        )
        places = (mask.cumsum(1) - 1).clamp(min=0)
        read = DynamicCache(config=self.model.config)
        logits = self._forward(ids, attention_mask=mask, position_ids=places, use_cache=True, **{self.cache_name: read})
        first = len(self.running)
        slots = torch.arange(first, first + len(chosen), device=self.device)
        if self.cache is None:
            self.cache = slot_cache.SlotCache(len(read.layers), self.slots, self.longest)
        self.cache.put(slots, read, mask.shape[1] - mask.sum(1))
        self.running += chosen
        self.positions[first : len(self.running)] = [len(self.prompts[i]) - 1 for i in chosen]
        self.counts[slots] = 0
        self.most[slots] = torch.from_numpy(self.limits[chosen]).to(self.device)
        if self.temperature > 0:
            for slot, i in enumerate(chosen, first):
                numbers = np.random.default_rng(self.seeds[i]).random(int(self.limits[i]))
                self.uniforms[slot, : len(numbers)] = torch.from_numpy(numbers).to(self.device)
        return self._draw(logits, slots)

    def _step(self) -> np.ndarray[Any, np.dtype[np.int8]]:
        """One more token of every running row."""
        assert self.cache is not None
        rows = torch.arange(len(self.running), device=self.device)
        positions = torch.from_numpy(self.positions[: len(self.running)]).to(self.device)
        length = int(self.positions[: len(self.running)].max()) + 1
        mask = torch.arange(length, device=self.device) <= positions[:, None]
        self.cache.prepare(rows, positions, length)
        logits = self._forward(
            self.drawn[rows, self.counts[rows] - 1][:, None],
            attention_mask=mask.long(),
            position_ids=positions[:, None],
            use_cache=True,
            **{self.cache_name: self.cache},
        )
        return self._draw(logits, rows)

    def _draw(self, logits: Tensor, slots: Tensor) -> np.ndarray[Any, np.dtype[np.int8]]:
        """Draws for int64[B] slots; of every running row int8: 0 goes on, 1 ended by itself, 2 is at its limit."""
        counts = self.counts[slots]
        uniforms = self.uniforms[slots, counts] if self.temperature > 0 else None
        ids, logprobs = draw(logits, uniforms, self.temperature)
        self.drawn[slots, counts], self.logprobs[slots, counts] = ids, logprobs
        self.counts[slots] = counts + 1
        state = torch.where(counts + 1 >= self.most[slots], 2, 0).masked_fill(torch.isin(ids, self.eos), 1)
        state = torch.where(logprobs.isfinite(), state, 2)  # the rollout's end tells
        states = np.zeros(len(self.running), np.int8)
        first = len(self.running) - len(slots)
        states[first:] = state.to(torch.int8).cpu().numpy()
        self.positions[first : len(self.running)] += 1
        return states

    def _leave(self, states: np.ndarray[Any, np.dtype[np.int8]], logprobs: bool) -> list[tuple[int, Rollout]]:
        """The rollouts of rows that ended; the last rows move into their slots."""
        ended = np.flatnonzero(states)
        if not len(ended):
            return []
        rollouts = [self._rollout(slot, stopped=states[slot] == 1, logprobs=logprobs) for slot in ended.tolist()]
        left = len(self.running) - len(ended)
        holes = [int(slot) for slot in ended if slot < left]
        movers = [slot for slot in range(left, len(self.running)) if not states[slot]]
        for source, target in zip(movers, holes, strict=True):
            self.running[target], self.positions[target] = self.running[source], self.positions[source]
        del self.running[left:]
        if movers:
            assert self.cache is not None
            sources, targets = (torch.tensor(a, device=self.device) for a in (movers, holes))
            self.cache.move(sources, targets, int(self.positions[holes].max()))
            for state in (self.counts, self.most, self.drawn, self.logprobs, self.uniforms):
                state[targets] = state[sources]
        return rollouts

    def _rollout(self, slot: int, *, stopped: bool, logprobs: bool) -> tuple[int, Rollout]:
        place = self.running[slot]
        prompt = self.prompts[place]
        count = int(self.positions[slot]) + 1 - len(prompt)
        ids = self.drawn[slot, :count].to(torch.int32).cpu().numpy()
        numbers = self.logprobs[slot, :count].cpu().numpy().copy()
        check_finite(numbers)
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH
        return place, Rollout(prompt, ids.copy(), reason, numbers if logprobs else None)


def _causal(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
