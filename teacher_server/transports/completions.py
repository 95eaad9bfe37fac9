"""Finished completions from the service's stream of pieces, for answers that are not streamed."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import numpy as np

from protos.errors import TeacherFailed
from protos.scores import Completion, CompletionDelta, GenerateRequest
from teacher_server.auth import Caller
from teacher_server.service import TeacherService


async def collect(service: TeacherService, request: GenerateRequest, caller: Caller) -> list[list[Completion]]:
    """The n completions of each prompt, in order."""
    return await gather(service.generate(request, caller), len(request.prompts), request.n)


async def gather(results: AsyncGenerator[list[CompletionDelta], None], prompts: int, n: int) -> list[list[Completion]]:
    """The n completions of each of so many prompts, in order, of a call's pieces."""
    pieces: dict[tuple[int, int], list[CompletionDelta]] = {}
    async with aclosing(results):
        async for deltas in results:
            for delta in deltas:
                pieces.setdefault((delta.prompt_index, delta.sample_index), []).append(delta)
    return [[join(pieces[prompt, sample]) for sample in range(n)] for prompt in range(prompts)]


def join(pieces: list[CompletionDelta]) -> Completion:
    """One completion of its pieces."""
    first, last = pieces[0], pieces[-1]
    if last.finish_reason is None or first.prompt_token_ids is None:
        raise TeacherFailed
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    top_ids = [piece.top_token_ids for piece in pieces if piece.top_token_ids is not None]
    top_logprobs = [piece.top_logprobs for piece in pieces if piece.top_logprobs is not None]
    return Completion(
        prompt_token_ids=first.prompt_token_ids,
        token_ids=np.concatenate([piece.token_ids for piece in pieces]),
        text="".join(piece.text for piece in pieces),
        finish_reason=last.finish_reason,
        logprobs=np.concatenate(logprobs) if logprobs else None,
        top_token_ids=np.concatenate(top_ids) if top_ids else None,
        top_logprobs=np.concatenate(top_logprobs) if top_logprobs else None,
        reasoning="".join(piece.reasoning for piece in pieces),
        reasoning_tokens=sum(piece.reasoning_tokens for piece in pieces),
        stop=last.stop,
    )
