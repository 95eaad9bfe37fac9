"""Each completion's own random numbers, for every backend that samples itself. Knows numpy alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

from protos.scores import Ids


def generator(seed: int | None, prompt_ids: Ids, sample_index: int) -> np.random.Generator:
    """Numbers of (seed, prompt int32[P], sample) alone, or fresh ones without a seed.

    The prompt is part of it, so that prompts of one call do not share their luck.
    """
    entropy = None if seed is None else [seed, zlib.crc32(prompt_ids.tobytes()), sample_index]
    return np.random.default_rng(entropy)


def uniforms(seed: int | None, prompt_ids: Ids, sample_index: int) -> Iterator[float]:
    """Endless numbers in [0, 1) of that generator."""
    numbers = generator(seed, prompt_ids, sample_index)
    while True:
        yield from numbers.random(64).tolist()
