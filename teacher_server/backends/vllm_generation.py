"""Completions from an engine that knows stop ids and lengths, with the budget of a think block kept around it.

A budgeted completion is a chain of plain ones: up to the opening tag, up to the closing tag or the budget, and on;
where the budget is spent the closing tokens are put in between. Knows an engine's completions, not its errors.
Legend: P prompt tokens, R new tokens.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np

from protos.scores import FinishReason, Ids, Sampling, Scores
from teacher_server.backends import randomness
from teacher_server.backends.base import Piece
from teacher_server.backends.rows import most_tokens, stop_ids
from teacher_server.backends.thinking import ThinkBudget, ThinkTags
from teacher_server.backends.vllm_engine import Engine, Tokens

ForcedLogprobs = Callable[[Ids, int, int], Awaitable[Scores]]
"""Log-probabilities of the tokens of int32[N] from a position on, with so many alternatives."""


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
    alternatives: int = 0

    def seed(self, sample_index: int, segment: int) -> int | None:
        """A seed of (seed, prompt, sample, segment): prompts and samples of one call do not share their luck."""
        if self.sampling.seed is None:
            return None
        entropy = randomness.entropy(self.sampling.seed, self.prompt_ids, sample_index, segment)
        return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


async def completion(
    wish: Wish, sample_index: int, engine: Engine, forced_logprobs: ForcedLogprobs
) -> AsyncGenerator[Piece, None]:
    """The pieces of one completion: one at its end, or as they come where `wish.stream`."""
    held: list[Tokens] = []
    async with aclosing(_tokens(wish, sample_index, engine, forced_logprobs)) as parts:
        async for tokens in parts:
            held.append(tokens)
            if wish.stream or tokens.ended:
                yield _piece(wish, sample_index, held)
                held = []


def _piece(wish: Wish, sample_index: int, held: list[Tokens]) -> Piece:
    """Consecutive tokens as one piece."""
    logprobs = [part.logprobs for part in held if part.logprobs is not None]
    top_ids = [part.top_ids for part in held if part.top_ids is not None]
    top_logprobs = [part.top_logprobs for part in held if part.top_logprobs is not None]
    return Piece(
        sample_index,
        np.concatenate([part.ids for part in held]),
        np.concatenate(logprobs) if wish.logprobs else None,
        {"stop": FinishReason.STOP, "length": FinishReason.LENGTH}.get(held[-1].ended),
        np.concatenate(top_ids) if wish.alternatives else None,
        np.concatenate(top_logprobs) if wish.alternatives else None,
    )


async def _tokens(
    wish: Wish, sample_index: int, engine: Engine, forced_logprobs: ForcedLogprobs
) -> AsyncGenerator[Tokens, None]:
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
                alternatives=wish.alternatives,
            )
            async with aclosing(parts):
                async for tokens in parts:
                    left -= len(tokens.ids)
                    context = np.concatenate([context, tokens.ids])
                    if budget is not None:
                        for token in tokens.ids:
                            budget.observe(int(token))
                    stopped = tokens.ended == "stop" and int(tokens.ids[-1]) in stops
                    ended = "stop" if stopped else "length" if tokens.ended and left == 0 else ""
                    yield replace(tokens, ended=ended)
            if ended:
                return
        segment += 1
        if budget is not None and budget.inside and budget.used >= budget.budget:
            closing = np.array(budget.tags.closing[:left], dtype=np.int32)
            start, context = len(context), np.concatenate([context, closing])
            left -= len(closing)
            for token in closing:
                budget.observe(int(token))
            scores = await forced_logprobs(context, start, wish.alternatives) if wish.logprobs else Scores()
            ended = "" if left else "length"
            yield Tokens(closing, scores.token_logprobs, ended, scores.top_token_ids, scores.top_logprobs)
            if not left:
                return
