"""The one thread that owns the model: scores and generations take turns, so that neither starves the other.

Knows queues and turns, no tensor. Work is handed over by `submit`; answers go through the Outbox.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from protos.errors import TeacherError, TeacherFailed, Unavailable
from teacher_server.backends.jobs import GenerateJob, Job, Outbox, ScoreJob
from teacher_server.backends.packing import pack
from teacher_server.backends.sampling_loop import SamplingLoop
from teacher_server.backends.scorer import Scorer
from teacher_server.backends.steps import Observer, Step, nobody

_LOG = logging.getLogger(__name__)
_GATHER_S = 0.002
"""How long an idle engine waits for company after a first job, in seconds."""


@dataclass(frozen=True, eq=False)
class Engine:
    """What the thread runs; `padded`, `equal` and `boundary` are those of `packing.pack`."""

    scorer: Scorer
    generation: SamplingLoop
    padded: bool
    equal: bool
    boundary: int


class Worker:
    """Makes an engine in its thread and runs jobs on it until it is stopped.

    `make` runs in the thread too: OpenMP keeps a pool of threads for every thread that computes, and a second pool on
    the same cores makes each small operation wait for a wake-up (measured: decoding takes twice as long). `ready`
    resolves when `make` has returned, or with its error.
    """

    def __init__(self, make: Callable[[], Engine], *, batch_tokens: int, observer: Observer = nobody) -> None:
        self._make = make
        self._observer = observer
        self._batch_tokens = batch_tokens
        self.ready: Future[None] = Future()
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._outbox = Outbox()
        self._scores: list[ScoreJob] = []
        self._batches: list[list[ScoreJob]] = []
        self._active: list[ScoreJob] = []
        self._lock = threading.Lock()
        self._end: TeacherError | None = None
        self.steps = 0
        """Batches of scores and steps of generation that have ended."""
        self._thread = threading.Thread(target=self._run, name="teacher-engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether it still takes work."""
        return self._end is None and self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Hands a job over; raises Unavailable once the thread has ended."""
        with self._lock:
            if self._end is not None:
                raise self._end
            self._inbox.put(job)

    def stop(self) -> None:
        """Ends the thread after the batch or step that it is in; jobs in flight fail with Unavailable. Blocks."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        end: TeacherError = Unavailable("the teacher is shutting down; try again in a while", retry_after_s=5.0)
        try:
            engine = self._make()
        except Exception as error:  # noqa: BLE001 - whoever awaits `ready` gets it
            self._fail_all(None, end)
            self.ready.set_exception(error)
            return
        self.ready.set_result(None)
        try:
            while self._receive(engine):
                self._turn(engine)
        except Exception:  # noqa: BLE001 - logged whole, and everybody in flight is told
            _LOG.exception("the engine's thread crashed; this teacher takes no more work until it is restarted")
            end = Unavailable("the teacher's engine is down; it has to be restarted", retry_after_s=30.0)
        finally:
            self._fail_all(engine, end)

    def _receive(self, engine: Engine) -> bool:
        """Takes in what has been submitted, waiting only while there is nothing else to do; False at the end."""
        idle = not (self._scores or self._batches or engine.generation.busy)
        tokens = 0
        while True:
            try:
                job = self._inbox.get(block=idle, timeout=_GATHER_S if tokens else None)
            except queue.Empty:
                return True
            if job is None:
                return False
            if isinstance(job, GenerateJob):
                engine.generation.add(job)
                tokens += len(job.prompt_ids) * job.n
            else:
                self._scores.append(job)
                tokens += len(job.sequence.token_ids)
            idle &= tokens < self._batch_tokens

    def _turn(self, engine: Engine) -> None:
        """One batch of scores, then generation for as long as that took, one step at least."""
        began = time.monotonic()
        self._pack(engine)
        if self._batches:
            batch = [job for job in self._batches.pop(0) if not job.cancelled]
            self._active = batch
            step = Step("score", len(batch), sum(len(job.sequence.token_ids) for job in batch))
            for job in batch:
                job.step = step
            self._score(engine.scorer, batch)
            self._active = []
            self.steps += 1
            self._outbox.flush()
            if batch:
                step.readout_s = engine.scorer.take_readout_s()
                self._observer(step.end())
        share = time.monotonic() - began
        began = time.monotonic()
        while engine.generation.busy:
            step = Step("generate", 0, 0)
            step.sequences, step.tokens = engine.generation.advance(self._outbox)
            self.steps += 1
            if step.tokens:
                self._observer(step.end())
            if time.monotonic() - began >= share:
                break

    def _pack(self, engine: Engine) -> None:
        """Packs again when scores have arrived; the batch with the oldest job comes first."""
        if not self._scores:
            return
        waiting = [job for job in (*(j for batch in self._batches for j in batch), *self._scores) if not job.cancelled]
        self._scores = []
        lengths = [len(job.sequence.token_ids) for job in waiting]
        batches = pack(lengths, self._batch_tokens, padded=engine.padded, equal=engine.equal, boundary=engine.boundary)
        self._batches = [[waiting[i] for i in batch] for batch in sorted(batches, key=min)]

    def _score(self, scorer: Scorer, jobs: list[ScoreJob]) -> None:
        """Scores a batch; where the engine fails it, in halves, so that only a job that fails alone is failed."""
        if not jobs:
            return
        try:
            scorer.score(jobs, self._outbox)
        except torch.AcceleratorError:
            raise  # the device's context is lost; only a restart helps
        except (RuntimeError, ValueError, IndexError, MemoryError) as error:
            left = [job for job in jobs if not (job.done or job.cancelled)]
            if len(left) <= 1 and len(jobs) == len(left):
                _LOG.exception("scoring a sequence of %d tokens failed", len(left[0].sequence.token_ids))
                self._outbox.fail(left[0], TeacherFailed())
                return
            _LOG.warning("a batch of %d sequences failed (%s); it is run again in halves", len(jobs), error)
        else:
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        middle = (len(left) + 1) // 2
        self._score(scorer, left[:middle])
        self._score(scorer, left[middle:])

    def _fail_all(self, engine: Engine | None, end: TeacherError) -> None:
        with self._lock:
            self._end = end
        waiting: list[Job] = [*self._active, *self._scores, *(j for batch in self._batches for j in batch)]
        if engine is not None:
            waiting.extend(engine.generation.jobs())
        while not self._inbox.empty():
            job = self._inbox.get_nowait()
            if job is not None:
                waiting.append(job)
        for job in waiting:
            self._outbox.fail(job, end)
        self._outbox.flush()
