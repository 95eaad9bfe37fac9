"""What crosses the border between asyncio and the engine's thread, in either direction.

Jobs are made and awaited on a loop; the thread reads them and answers through an Outbox. Knows no model.
"""

from __future__ import annotations

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from protos.errors import TeacherError
from protos.scores import Field, Ids, Sampling, Scores, ScoreSpec, Sequence
from teacher_server.backends.base import Piece
from teacher_server.backends.steps import Step
from teacher_server.backends.thinking import ThinkTags

_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class ScoreJob:
    """One sequence to score; `cancelled` is set on the loop, read in the thread."""

    sequence: Sequence
    spec: ScoreSpec
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[Scores]
    cancelled: bool = False
    done: bool = False
    step: Step | None = None
    """The batch that it is or was in."""

    @property
    def fields(self) -> frozenset[Field]:
        """The fields that this sequence gets."""
        return self.spec.fields(self.sequence.candidates)

    def settle(self, answer: Scores | TeacherError) -> None:
        """On the loop: answers the caller, unless it went away."""
        if self.future.done():
            return
        if isinstance(answer, TeacherError):
            self.future.set_exception(answer)
        else:
            self.future.set_result(answer)


@dataclass(eq=False)
class GenerateJob:
    """One prompt to complete `n` times; `answers` ends with None or an error."""

    prompt_ids: Ids
    sampling: Sampling
    n: int
    logprobs: bool
    stream: bool
    loop: asyncio.AbstractEventLoop
    tags: ThinkTags | None = None
    alternatives: int = 0
    dropped: AbstractSet[int] = frozenset()
    """Completions that nobody waits for any more; grown on the loop, read in the thread."""
    answers: asyncio.Queue[list[Piece] | TeacherError | None] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    done: bool = False
    left: int = 0

    def __post_init__(self) -> None:
        self.left = self.n

    def settle(self, answer: list[Piece] | TeacherError | None) -> None:
        """On the loop: hands pieces, an error or the end to the caller."""
        self.answers.put_nowait(answer)


Job = ScoreJob | GenerateJob


class Outbox:
    """Answers of the thread, delivered by one call a loop instead of one an answer."""

    def __init__(self) -> None:
        self._waiting: dict[asyncio.AbstractEventLoop, list[tuple[Callable[[Any], None], Any]]] = defaultdict(list)

    def score(self, job: ScoreJob, answer: Scores | TeacherError) -> None:
        """Queues the one answer of a score."""
        if not job.done:
            job.done = True
            self._waiting[job.loop].append((job.settle, answer))

    def pieces(self, job: GenerateJob, pieces: list[Piece]) -> None:
        """Queues new pieces and, after the last completion's end, the end."""
        if job.done:
            return
        self._waiting[job.loop].append((job.settle, pieces))
        self._ended(job, sum(piece.finish_reason is not None for piece in pieces))

    def dropped(self, job: GenerateJob) -> None:
        """Takes note that one of its completions ended without a piece; queues the end where it was the last one."""
        if not job.done:
            self._ended(job, 1)

    def _ended(self, job: GenerateJob, completions: int) -> None:
        job.left -= completions
        if job.left == 0:
            job.done = True
            self._waiting[job.loop].append((job.settle, None))

    def fail(self, job: Job, error: TeacherError) -> None:
        """Queues an error as the last answer."""
        if not job.done:
            job.done = True
            self._waiting[job.loop].append((job.settle, error))

    def flush(self) -> None:
        """Delivers all that is queued."""
        waiting, self._waiting = self._waiting, defaultdict(list)
        for loop, calls in waiting.items():
            try:
                loop.call_soon_threadsafe(_run, calls)
            except RuntimeError:  # the loop was closed: nobody waits any more
                _LOG.debug("%d answers had no loop to go to", len(calls))


def _run(calls: list[tuple[Callable[[Any], None], Any]]) -> None:
    for settle, answer in calls:
        settle(answer)
