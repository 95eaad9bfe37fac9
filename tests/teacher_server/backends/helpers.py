"""Short ways to make requests and to collect their answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from protos.scores import FinishReason, Ids, Sampling
from teacher_server.backends.base import Backend


def ids_of(rng: np.random.Generator, length: int, vocab_size: int = 256) -> Ids:
    """int32[length] of random tokens."""
    return rng.integers(0, vocab_size, length).astype(np.int32)


class Collected:
    """The n completions of one prompt, joined from their pieces."""

    def __init__(self, n: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(n)]
        self.logprobs: list[list[float]] = [[] for _ in range(n)]
        self.reasons: list[FinishReason | None] = [None] * n
        self.pieces = [0] * n


async def complete(backend: Backend, prompt: Ids, *, n: int = 1, stream: bool = False, **sampling: Any) -> Collected:
    """Runs one Generate to its end and checks what every backend promises about pieces."""
    out = Collected(n)
    async for pieces in backend.generate(prompt, Sampling(**sampling), n=n, logprobs=True, stream=stream, mode=None):
        assert pieces
        for piece in pieces:
            i = piece.sample_index
            assert out.reasons[i] is None, "a piece after the end"
            assert piece.logprobs is not None
            assert piece.token_ids.dtype == np.int32
            assert piece.logprobs.dtype == np.float32
            assert len(piece.logprobs) == len(piece.token_ids) > 0
            out.tokens[i] += piece.token_ids.tolist()
            out.logprobs[i] += piece.logprobs.tolist()
            out.reasons[i] = piece.finish_reason
            out.pieces[i] += 1
    assert None not in out.reasons
    return out
