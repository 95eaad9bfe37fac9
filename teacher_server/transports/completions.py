"""Finished completions from the service's stream of pieces, for answers that are not streamed."""

from __future__ import annotations

from contextlib import aclosing

import numpy as np

from protos.errors import TeacherFailed
from protos.scores import Completion, CompletionDelta, GenerateRequest
from teacher_server.auth import Caller
from teacher_server.service import TeacherService


async def collect(service: TeacherService, request: GenerateRequest, caller: Caller) -> list[list[Completion]]:
    """The n completions of each prompt, in order."""
    pieces: dict[tuple[int, int], list[CompletionDelta]] = {}
    async with aclosing(service.generate(request, caller)) as results:
        async for deltas in results:
            for delta in deltas:
                pieces.setdefault((delta.prompt_index, delta.sample_index), []).append(delta)
    return [[join(pieces[prompt, sample]) for sample in range(request.n)] for prompt in range(len(request.prompts))]


def join(pieces: list[CompletionDelta]) -> Completion:
    """One completion of its pieces."""
    first, last = pieces[0], pieces[-1]
    if last.finish_reason is None or first.prompt_token_ids is None:
        raise TeacherFailed
    logprobs = [piece.logprobs for piece in pieces if piece.logprobs is not None]
    return Completion(
        prompt_token_ids=first.prompt_token_ids,
        token_ids=np.concatenate([piece.token_ids for piece in pieces]),
        text="".join(piece.text for piece in pieces),
        finish_reason=last.finish_reason,
        logprobs=np.concatenate(logprobs) if logprobs else None,
    )
