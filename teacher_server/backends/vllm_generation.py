"""Completions from an engine that knows stop ids and lengths, with the budget of a think block kept around it.

A budgeted completion is a chain of plain ones: up to the opening tag, up to the closing tag or the budget, and on;
where the budget is spent the closing tokens are put in between. Knows an engine's completions, not its errors.
Legend: P prompt tokens, R new tokens.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from protos.scores import FinishReason, Floats, Ids, Sampling
from teacher_server.backends import randomness
from teacher_server.backends.base import Piece
from teacher_server.backends.rows import most_tokens, stop_ids
from teacher_server.backends.thinking import ThinkBudget, ThinkTags
from teacher_server.backends.vllm_engine import Engine, Tokens

ForcedLogprobs = Callable[[Ids, int], Awaitable[Floats]]
"""Log-probabilities of the tokens of int32[N] from a position on."""


@dataclass(frozen=True)
class Wish:
    """What every one of a prompt's n completions is asked for; `eos` are the model's ids, `longest` bounds P + R."""

    prompt_ids: Ids
    sampling: Sampling
    logprobs: bool
    stream: bool
    eos: tuple[int, ...]
    longest: int
    tags: ThinkTags | None

    def seed(self, sample_index: int, segment: int) -> int | None:
        """A seed of (seed, prompt, sample, segment): prompts and samples of one call do not share their luck."""
        if self.sampling.seed is None:
            return None
        entropy = randomness.entropy(self.sampling.seed, self.prompt_ids, sample_index, segment)
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


async def completion(
    wish: Wish, sample_index: int, engine: Engine, forced_logprobs: ForcedLogprobs
) -> AsyncIterator[Piece]:
    """The pieces of one completion: one at its end, or as they come where `wish.stream`."""
    held: list[Tokens] = []
    async for tokens in _tokens(wish, sample_index, engine, forced_logprobs):
        held.append(tokens)
        if wish.stream or tokens.ended:
            ids = np.concatenate([part.ids for part in held])
            numbers = [part.logprobs for part in held if part.logprobs is not None]
            reason = {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}.get(tokens.ended)
            yield Piece(sample_index, ids, np.concatenate(numbers) if wish.logprobs else None, reason)
            held = []


async def _tokens(
    wish: Wish, sample_index: int, engine: Engine, forced_logprobs: ForcedLogprobs
) -> AsyncIterator[Tokens]:
    """The new tokens; `ended` is set on the last ones alone."""
    context, segment = wish.prompt_ids, 0
    stops = stop_ids(wish.sampling, wish.eos)
    left = most_tokens(wish.sampling, len(context), wish.longest)
    budget = None
    if wish.tags is not None and wish.sampling.max_thinking_tokens:
        budget = ThinkBudget.after(context, wish.tags, wish.sampling.max_thinking_tokens)
    while True:
        watched, most = stops, left
        if budget is not None:
            watched = stops | {budget.tags.open_id, budget.tags.close_id}
            if budget.inside:
                most = min(left, budget.budget - budget.used)
        if most:
            parts = engine.complete(
                context,
                wish.sampling,
                stops=sorted(watched),
                most=most,
                seed=wish.seed(sample_index, segment),
                logprobs=wish.logprobs,
                stream=wish.stream,
            )
            async for tokens in parts:
                left -= len(tokens.ids)
                context = np.concatenate([context, tokens.ids])
                if budget is not None:
                    for token in tokens.ids:
                        budget.observe(int(token))
                stopped = tokens.ended == "stop" and int(tokens.ids[-1]) in stops
                ended = "stop" if stopped else "length" if tokens.ended and left == 0 else ""
                yield Tokens(tokens.ids, tokens.logprobs, ended)
            if ended:
                return
        segment += 1
        if budget is not None and budget.inside and budget.used >= budget.budget:
            closing = np.array(budget.tags.closing[:left], dtype=np.int32)
            start, context = len(context), np.concatenate([context, closing])
            left -= len(closing)
            for token in closing:
                budget.observe(int(token))
            numbers = await forced_logprobs(context, start) if wish.logprobs else None
            yield Tokens(closing, numbers, "" if left else "length")
            if not left:
                return
