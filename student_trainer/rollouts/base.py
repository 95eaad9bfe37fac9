"""What a rollout is, and what every engine that samples from the student does.

It knows no engine and no model: numpy alone.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from protos.scores import FinishReason, Floats, Ids

from ..errors import UserError


@dataclass(frozen=True, eq=False)
class Rollout:
    """One sampled completion: int32[P], int32[R] (a sampled end token stays, none is added), its end.

    `logprobs` float32[R] are the sampler's, in nats at the sampling temperature over the real vocabulary; None unless
    asked for.
    """

    prompt_ids: Ids
    completion_ids: Ids
    finish_reason: FinishReason
    logprobs: Floats | None = None


class RolloutEngine(Protocol):
    """Samples from exactly softmax(logits / temperature) over the real vocabulary: no top_p, no top_k, no penalty."""

    name: str
    """As `policy_distillation.rollout_engine` calls it."""

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
        """One completion for each prompt: its place among `prompts` and the rollout, each as soon as it has ended.

        At temperature 0 it is the most likely completion, with log-probabilities at temperature 1. At most `rows` run
        at the same time, or as many as the engine was made for. `max_length` bounds prompt and completion together;
        every prompt must be shorter.

        A rollout depends on the weights, `seed`, its own prompt and its name among `names` alone, whatever else is
        sampled beside it (up to rounding, which can tip a draw that lies on the edge). Weights must not change before
        the last one has come, and one `sample` must end, or be closed, before the next begins.
        """
        ...

    def update_weights(self) -> None:
        """Says that the student's weights have changed; the next `sample` uses the new ones."""
        ...

    def close(self) -> None:
        """Gives back what the engine holds; it can be called twice."""
        ...


def in_order(engine: RolloutEngine, prompts: Sequence[Ids], **options: Any) -> list[Rollout]:
    """The rollouts of `engine.sample` in the order of `prompts`."""
    found = dict(engine.sample(prompts, **options))
    return [found[i] for i in range(len(prompts))]


def check_finite(logprobs: Floats) -> None:
    """UserError where a sampler's log-probabilities are not finite, so its logits were not either."""
    if not np.isfinite(logprobs).all():
        raise UserError(
            "the student's logits are not finite, so nothing can be sampled from it",
            next_step="lower the learning rate, or go on from an earlier checkpoint",
        )


def row_limits(prompts: Sequence[Ids], max_new_tokens: int, max_length: int | None) -> npt.NDArray[np.int64]:
    """The largest number of new tokens of each prompt, int64[B]."""
    limits = np.full(len(prompts), max_new_tokens, np.int64)
    if max_length is not None:
        lengths = np.fromiter((len(p) for p in prompts), np.int64, len(prompts))
        limits = np.minimum(limits, max_length - lengths)
    assert not len(limits) or limits.min() >= 1, "a prompt leaves no room for a completion"
    return limits


def row_seeds(prompts: Sequence[Ids], seed: int, names: Sequence[str] | None) -> list[np.random.SeedSequence]:
    """A source of random numbers for each prompt, made of the seed, the prompt, its name, and how often it came before.

    So neither the order of the prompts, nor the batch, nor the process that samples it decides what a prompt gets, and
    two of the same differ.
    """
    seen: Counter[tuple[bytes, str]] = Counter()
    seeds = []
    for prompt, name in zip(prompts, names or [""] * len(prompts), strict=True):
        key = (prompt.tobytes(), name)
        seeds.append(np.random.SeedSequence([seed, zlib.crc32(key[0]), zlib.crc32(name.encode()), seen[key]]))
        seen[key] += 1
    return seeds
