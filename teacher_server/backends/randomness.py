"""Each completion's own random numbers, for every backend that samples itself. Knows numpy alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from protos.scores import Ids


def entropy(seed: int, prompt_ids: Ids, *places: int) -> list[int]:
    """What random numbers of (seed, prompt int32[P], sample and whatever else sets them apart) are made from.

    The prompt is part of it, so that prompts of one call do not share their luck.
    """
    return [seed, zlib.crc32(prompt_ids.tobytes()), *places]


def generator(seed: int | None, prompt_ids: Ids, sample_index: int) -> np.random.Generator:
    """Numbers of (seed, prompt int32[P], sample) alone, or fresh ones without a seed."""
    return np.random.default_rng(None if seed is None else entropy(seed, prompt_ids, sample_index))


def uniforms(seed: int | None, prompt_ids: Ids, sample_index: int) -> Iterator[float]:
    """Endless numbers in [0, 1) of that generator."""
    numbers = generator(seed, prompt_ids, sample_index)
    while True:
        yield from numbers.random(64).tolist()
