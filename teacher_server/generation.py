"""Generation's part of the service: prompts to tokens, the engine's pieces to deltas with text, many streams to one.

It knows no transport and no queue. Legend: P tokens of a prompt, R new tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from functools import partial
from typing import Any

import numpy as np

from protos.errors import InvalidSequence, TeacherFailed
from protos.scores import CompletionDelta, FinishReason, GenerateRequest, Ids, Mode, Prompt
from teacher_server.backends.base import Backend, Piece, TextCodec
from teacher_server.detokenizer import Detokenizer
from teacher_server.grown_text import Grown, GrownText


def tokenize(
    index: int, prompt: Prompt, mode: Mode | None, text: TextCodec, *, special: bool = False, opening: bool = True
) -> Ids:
    """int32[P] of a prompt; InvalidSequence with its index where the template refuses the messages.

    `special` and `opening` are TextCodec's, for text and for messages.
    """
    if prompt.token_ids is not None and len(prompt.token_ids):
        return prompt.token_ids
    if prompt.text:
        return text.encode(prompt.text, special=special)
    try:
        return text.render(prompt.messages, mode, opening=opening)
    except ValueError as error:
        raise InvalidSequence(f"prompt {index}: {error}", index=index) from error


async def complete(
    backend: Backend, request: GenerateRequest, index: int, prompt_ids: Ids, mode: Mode | None
) -> AsyncIterator[CompletionDelta]:
    """The deltas of one prompt's n completions; TeacherFailed where the engine breaks its promises.

    A completion that a stop string ends is dropped from the engine. Under rules with stop strings the pieces come one
    by one, stream or not, since somebody must look at them.
    """
    rules, texts = request.rules, _texts(backend.text, request, prompt_ids)
    begun, ended = [False] * request.n, [False] * request.n
    dropped: set[int] = set()
    pieces = backend.generate(
        prompt_ids,
        request.sampling,
        n=request.n,
        logprobs=request.logprobs,
        stream=request.stream or bool(rules and rules.stop),
        mode=mode,
        alternatives=request.alternatives,
        dropped=dropped,
    )
    try:
        async for group in pieces:
            for piece in group:
                sample = piece.sample_index
                if sample in dropped:
                    continue
                _check_piece(piece, request, ended[sample])
                grown = texts[sample](piece.token_ids, piece.finish_reason)
                if grown.stop:
                    dropped.add(sample)
                    piece = _cut(piece, grown.tokens)
                ended[sample] = piece.finish_reason is not None
                yield CompletionDelta(
                    prompt_index=index,
                    sample_index=sample,
                    token_ids=piece.token_ids,
                    logprobs=piece.logprobs,
                    text=grown.text,
                    finish_reason=piece.finish_reason,
                    prompt_token_ids=None if begun[sample] else prompt_ids,
                    top_token_ids=piece.top_token_ids,
                    top_logprobs=piece.top_logprobs,
                    reasoning=grown.reasoning,
                    reasoning_tokens=grown.reasoning_tokens,
                    stop=grown.stop,
                )
                begun[sample] = True
            if all(ended):
                break
    finally:
        close = getattr(pieces, "aclose", None)
        if close is not None:
            await close()
    if not all(ended):
        raise TeacherFailed from RuntimeError(f"the engine ended {ended.count(False)} completions without a reason")


Read = Callable[[Ids, FinishReason | None], Grown]


def _texts(text: TextCodec, request: GenerateRequest, prompt_ids: Ids) -> list[Read]:
    """What gives the text of each of the n completions as it grows."""
    if request.rules is not None:
        return [GrownText(text.decode, request.rules, prompt_ids, text.think_ids).add for _ in range(request.n)]

    def plain(detokenizer: Detokenizer, ids: Ids, reason: FinishReason | None) -> Grown:
        return Grown(detokenizer.add(ids, last=reason is not None))

    return [partial(plain, Detokenizer(text.decode)) for _ in range(request.n)]


def _cut(piece: Piece, tokens: int) -> Piece:
    """The piece up to the token that completes a stop string."""
    return Piece(
        piece.sample_index,
        piece.token_ids[:tokens],
        None if piece.logprobs is None else piece.logprobs[:tokens],
        FinishReason.STOP,
        None if piece.top_token_ids is None else piece.top_token_ids[:tokens],
        None if piece.top_logprobs is None else piece.top_logprobs[:tokens],
    )


def _check_piece(piece: Piece, request: GenerateRequest, ended: bool) -> None:
    if ended:
        raise TeacherFailed from RuntimeError("the engine continued a completion that had ended")
    if request.logprobs and (piece.logprobs is None or piece.logprobs.shape != piece.token_ids.shape):
        raise TeacherFailed from RuntimeError("the engine gave tokens without their log-probabilities")
    shape = (len(piece.token_ids), request.alternatives)
    if request.alternatives and any(a is None or a.shape != shape for a in (piece.top_token_ids, piece.top_logprobs)):
        raise TeacherFailed from RuntimeError("the engine gave tokens without the alternatives to them")
    if any(a is not None and not np.isfinite(a).all() for a in (piece.logprobs, piece.top_logprobs)):
        raise TeacherFailed from RuntimeError("the engine gave a log-probability that is not finite")


class Merged:
    """Many producers' deltas as one stream of lists, at most one delta of a completion in each list.

    A producer is a coroutine that calls `put`. `next` gives None at the end and raises what a producer raised. `close`
    cancels the producers and waits for them.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[CompletionDelta | asyncio.Task[None]] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self._running = 0
        self._left: CompletionDelta | None = None

    def put(self, delta: CompletionDelta) -> None:
        """Hands a delta to the reader."""
        self._queue.put_nowait(delta)

    def start(self, producer: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Runs a producer."""
        task = asyncio.get_running_loop().create_task(producer)
        self._tasks.append(task)
        self._running += 1
        task.add_done_callback(self._queue.put_nowait)
        return task

    async def next(self) -> list[CompletionDelta] | None:
        """All that is there, at least one delta."""
        group: dict[tuple[int, int], CompletionDelta] = {}
        while True:
            if self._left is not None:
                delta, self._left = self._left, None
            elif self._queue.empty() and (group or not self._running):
                return list(group.values()) or None
            else:
                item = await self._queue.get()
                if isinstance(item, asyncio.Task):
                    self._running -= 1
                    item.result()
                    continue
                delta = item
            key = (delta.prompt_index, delta.sample_index)
            if key in group:
                self._left = delta
                return list(group.values())
            group[key] = delta

    async def close(self) -> None:
        """Cancels what still runs and waits until it has ended."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
