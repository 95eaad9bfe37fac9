"""Short ways to make requests and to collect their answers."""

from __future__ import annotations

from typing import Any

import numpy as np

from protos.scores import FinishReason, Floats, Ids, Sampling, ScoreSpec, Sequence
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


async def check_alternatives(backend: Backend, prompt: Ids, *, stream: bool, **sampling: Any) -> None:
    """The 4 alternatives to each token of 2 completions have the log-probabilities of the 4 best that a score names."""
    tokens: list[list[int]] = [[], []]
    top: list[list[Floats]] = [[], []]
    options: dict[str, Any] = {"n": 2, "logprobs": True, "stream": stream, "mode": None, "alternatives": 4}
    async for pieces in backend.generate(prompt, Sampling(**sampling), **options):
        for piece in pieces:
            assert piece.top_token_ids is not None
            assert piece.top_logprobs is not None
            assert (piece.top_token_ids.dtype, piece.top_logprobs.dtype) == (np.int32, np.float32)
            assert piece.top_token_ids.shape == piece.top_logprobs.shape == (len(piece.token_ids), 4)
            tokens[piece.sample_index] += piece.token_ids.tolist()
            top[piece.sample_index].append(piece.top_logprobs)
    for made, given in zip(tokens, top, strict=True):
        whole = np.concatenate([prompt, np.array(made, dtype=np.int32)])
        scores = await backend.score(Sequence(whole, len(prompt)), ScoreSpec(4))
        np.testing.assert_allclose(np.concatenate(given), scores.top_logprobs, atol=1e-4)


async def check_dropped(backend: Backend, prompt: Ids, tokens: int) -> None:
    """One of three completions that nobody waits for any more ends within a few steps; the others go on."""
    made = [0, 0, 0]
    dropped: set[int] = set()
    sampling = Sampling(tokens, ignore_eos=True, seed=1)
    options: dict[str, Any] = {"n": 3, "logprobs": False, "stream": True, "mode": None, "dropped": dropped}
    async for pieces in backend.generate(prompt, sampling, **options):
        for piece in pieces:
            made[piece.sample_index] += len(piece.token_ids)
        if made[1] >= 3:
            dropped.add(1)
    assert (made[0], made[2]) == (tokens, tokens)
    assert 3 <= made[1] < tokens // 2
