"""Samples completions from the student, by one of several engines behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from protos.scores import Ids

from .base import Rollout, RolloutEngine, in_order
from .continuous import ContinuousEngine
from .padded import PaddedEngine

__all__ = ["Rollout", "RolloutEngine", "in_order", "model_engine", "sample", "sample_sorted"]


def model_engine(model: Any, *, slots: int, **same: Any) -> RolloutEngine:
    """The engine that samples from `model` itself: continuous where its attention allows that, else padded."""
    kind = ContinuousEngine if ContinuousEngine.suits(model) else PaddedEngine
    return kind(model, slots=slots, **same)


def sample(model: Any, prompts: Sequence[Ids], *, seed: int | None = None, **options: Any) -> list[Rollout]:
    """All prompts at once; `options` are those of an engine and of its `sample`."""
    return sample_sorted(model, prompts, rows=len(prompts), seed=seed, **options)


def sample_sorted(
    model: Any, prompts: Sequence[Ids], *, rows: int, seed: int | None = None, **options: Any
) -> list[Rollout]:
    """At most `rows` prompts at a time; the order given."""
    same = {name: options.pop(name) for name in ("vocab_size", "eos_ids", "pad_id")}
    return in_order(model_engine(model, slots=max(rows, 1), **same), prompts, seed=seed or 0, **options)
