"""Scoring's part of the service: known scores, computations that equal requests share, and the engine's promises.

It takes calls that have been checked; it knows no transport and no deadline. Legend: T scored positions,
K alternatives, C candidates, M temperatures.
"""

from __future__ import annotations

import itertools
import logging

from protos.errors import TeacherError, TeacherFailed
from protos.scores import Field, ScoreRequest, Scores, ScoreSpec, Sequence
from teacher_server.auth import Caller
from teacher_server.backends.base import Backend
from teacher_server.cache import Flight, Flights, Key, ScoreCache, score_key
from teacher_server.metrics import Metrics
from teacher_server.scheduling import Cost, Lane, Scheduler, Unit
from teacher_server.usage import UsageByClient

log = logging.getLogger(__name__)


class Scoring:
    """Answers sequences from the cache, from what is in flight, or from the engine in its lane's order."""

    def __init__(
        self, scheduler: Scheduler, lane: Lane, metrics: Metrics, usage: UsageByClient, cache_bytes: int, share: bool
    ) -> None:
        self._scheduler = scheduler
        self._lane = lane
        self._metrics = metrics
        self._usage = usage
        self._share = share
        self._cache = ScoreCache(cache_bytes if share else 0)
        self._flights = Flights()
        self._serial = itertools.count()
        metrics.cache_bytes.set_function(lambda: self._cache.nbytes)

    def begin(
        self, backend: Backend, request: ScoreRequest, caller: Caller
    ) -> tuple[list[tuple[int, Scores]], list[tuple[int, Flight]]]:
        """(index, scores) of the sequences that are known, and (index, flight) of the others; `leave` every flight.

        Overloaded starts nothing. Everything happens at once, so that no other call comes in between.
        """
        known: list[tuple[int, Scores]] = []
        new: dict[Key, Sequence] = {}
        keys = [self._key(backend.info.fingerprint, sequence, request.spec) for sequence in request.sequences]
        waiting = []
        for index, (key, sequence) in enumerate(zip(keys, request.sequences, strict=True)):
            scores = self._cache.get(key)
            if scores is not None:
                known.append((index, scores))
                continue
            waiting.append(index)
            if key not in self._flights:
                new.setdefault(key, sequence)
        sizes = [len(sequence.token_ids) for sequence in new.values()]
        costs = [Cost(n, n) for n in sizes]
        units = dict(zip(new, self._scheduler.admit(self._lane, caller.name, costs, caller.weight), strict=True))
        flights = []
        usage = self._usage.of(caller.name)
        for index in waiting:
            key, sequence = keys[index], request.sequences[index]
            unit = units.pop(key, None)
            if unit is None:
                flight = self._flights.join(key)
                self._metrics.joined_tokens.inc(len(sequence.token_ids))
                usage.joined_tokens += len(sequence.token_ids)
                if flight.unit is not None:
                    self._scheduler.claim(flight.unit, caller.name, caller.weight)
            else:
                flight = self._flights.start(key, self._compute(backend, unit, key, sequence, request.spec, caller))
                flight.unit = unit
                self._scheduler.follow(unit, flight.task)
            flights.append((index, flight))
        cached = sum(len(request.sequences[index].token_ids) for index, _ in known)
        self._metrics.cached_tokens.inc(cached)
        usage.cached_tokens += cached
        return known, flights

    def leave(self, flight: Flight) -> None:
        """Gives up on a flight; the last one who does cancels it."""
        self._flights.leave(flight)

    def _key(self, fingerprint: str, sequence: Sequence, spec: ScoreSpec) -> Key:
        """Equal for equal work; where nothing is shared, never equal."""
        return score_key(fingerprint, sequence, spec) if self._share else b"%d" % next(self._serial)

    async def _compute(
        self, backend: Backend, unit: Unit, key: Key, sequence: Sequence, spec: ScoreSpec, caller: Caller
    ) -> Scores:
        await unit.turn
        self._metrics.queue_seconds.labels("score").observe(self._scheduler.waited(unit))
        try:
            scores = await backend.score(sequence, spec)
            check_scores(scores, sequence, spec, backend.info.hidden_size)
        except TeacherError:
            raise
        except Exception as error:
            log.exception("the engine failed on a sequence of %s (request %s)", caller.name, caller.request_id)
            raise TeacherFailed from error
        self._metrics.scored_tokens.inc(len(sequence.token_ids))
        self._usage.of(unit.payer).scored_tokens += len(sequence.token_ids)
        if scores.hidden_states is None:  # one sequence of them would push out the scores of a thousand others
            self._cache.put(key, scores)
        return scores


def check_scores(scores: Scores, sequence: Sequence, spec: ScoreSpec, hidden_size: int) -> None:
    """ValueError where an engine gave another thing than it was asked for, or a number that is not finite."""
    t, m = sequence.positions, len(spec.temperatures)
    shapes: dict[str, tuple[int, ...]] = {}
    for field in spec.fields(sequence.candidates):
        if field is Field.TOP:
            shapes["top_token_ids"] = shapes["top_logprobs"] = (t, spec.top_k)
        elif field is Field.TOKEN_LOGPROBS:
            shapes[field.value] = (t,)
        elif field is Field.HIDDEN_STATES:
            shapes[field.value] = (t, hidden_size)
        else:
            shapes[field.value] = (t, sequence.candidates if field is Field.CANDIDATE_LOGPROBS else m)
    given = {name: array.shape for name, array in scores.arrays().items()}
    if given != shapes:
        raise ValueError(f"the engine gave {given}, asked for {shapes}")
    if not scores.finite():
        raise ValueError("the engine gave a number that is not finite")
