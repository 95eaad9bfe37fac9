"""Scoring's part of the service: known scores, computations that equal requests share, and the engine's promises.

It takes calls that have been checked; it knows no transport and no deadline. Legend: T scored positions,
K alternatives, C candidates, M temperatures.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass

from protos.errors import TeacherError, TeacherFailed
from protos.scores import Field, ScoreRequest, Scores, ScoreSpec, Sequence
from teacher_server.auth import Caller
from teacher_server.backends import steps
from teacher_server.backends.base import Backend
from teacher_server.cache import BATCH_BYTES, DiskTier, Flight, Flights, Key, ScoreCache, score_key
from teacher_server.live import Live
from teacher_server.metrics import Metrics
from teacher_server.scheduling import Cost, Lane, Scheduler, Unit
from teacher_server.traces import Part
from teacher_server.usage import UsageByClient

log = logging.getLogger(__name__)


@dataclass
class Begun:
    """A call's sequences: (index, scores) of those in memory, indices of those on the disk, flights of the others."""

    known: list[tuple[int, Scores]] = dataclasses.field(default_factory=list)
    stored: list[int] = dataclasses.field(default_factory=list)
    flights: dict[int, Flight] = dataclasses.field(default_factory=dict)


class Scoring:
    """Answers sequences from the cache, from what is in flight, or from the engine in its lane's order."""

    def __init__(
        self,
        scheduler: Scheduler,
        lane: Lane,
        metrics: Metrics,
        usage: UsageByClient,
        live: Live,
        cache: ScoreCache,
        disk: DiskTier | None,
        share: bool,
    ) -> None:
        self._scheduler = scheduler
        self._lane = lane
        self._metrics = metrics
        self._usage = usage
        self._live = live
        self._share = share
        self._cache = cache
        self._disk = disk if share else None
        self._flights = Flights()
        self._serial = itertools.count()
        metrics.cache_bytes.set_function(lambda: self._cache.nbytes)

    @property
    def cache_bytes(self) -> int:
        """Bytes of scores in memory."""
        return self._cache.nbytes

    async def begin(self, backend: Backend, request: ScoreRequest, caller: Caller) -> Begun:
        """What is known of a call's sequences, and the rest on its way; `leave` every flight.

        Overloaded starts nothing. After a look at the disk everything happens at once, so that no other call comes in
        between.
        """
        keys = [self._key(backend.info.fingerprint, sequence, request.spec) for sequence in request.sequences]
        stored: set[Key] = set()
        if self._disk is not None and Field.HIDDEN_STATES not in request.spec.want:
            asked = {key for key in keys if key not in self._cache and key not in self._flights}
            stored = await self._disk.known(asked) if asked else stored
        begun = Begun()
        new: dict[Key, Sequence] = {}
        waiting = []
        for index, (key, sequence) in enumerate(zip(keys, request.sequences, strict=True)):
            scores = self._cache.get(key)
            if scores is not None:
                begun.known.append((index, scores))
            elif key in stored and key not in self._flights:
                begun.stored.append(index)
            else:
                waiting.append(index)
                if key not in self._flights:
                    new.setdefault(key, sequence)
        costs = [Cost(len(sequence.token_ids), len(sequence.token_ids)) for sequence in new.values()]
        units = dict(zip(new, self._scheduler.admit(self._lane, caller.name, costs, caller.weight), strict=True))
        for index in waiting:
            unit = units.pop(keys[index], None)
            begun.flights[index] = self._fly(backend, keys[index], request, index, caller, unit)
        self._count_known(request, [index for index, _ in begun.known], caller, "memory")
        return begun

    async def read(self, backend: Backend, request: ScoreRequest, indices: list[int]) -> dict[int, Scores]:
        """The scores of sequences that are on the disk; those that it does not give must be computed after all."""
        assert self._disk is not None
        keys = {index: self._key(backend.info.fingerprint, request.sequences[index], request.spec) for index in indices}
        found = await self._disk.read(set(keys.values()))
        for key, scores in found.items():
            self._cache.put(key, scores)
        return {index: found[key] for index, key in keys.items() if key in found}

    def batches(self, request: ScoreRequest, indices: list[int]) -> Iterator[list[int]]:
        """Sequences that are on the disk, in parts whose scores take about BATCH_BYTES: a client may read slowly."""
        batch: list[int] = []
        size = 0
        for index in indices:
            sequence, spec = request.sequences[index], request.spec
            size += 4 * sequence.positions * (1 + 2 * spec.top_k + sequence.candidates + 2 * len(spec.temperatures))
            batch.append(index)
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    def count_read(self, request: ScoreRequest, indices: list[int], caller: Caller) -> None:
        """Counts what was read as known."""
        self._count_known(request, indices, caller, "disk")

    def compute_after_all(self, backend: Backend, request: ScoreRequest, index: int, caller: Caller) -> Flight:
        """The flight of a sequence whose score was lost while its call was in progress; it cannot be refused."""
        key = self._key(backend.info.fingerprint, request.sequences[index], request.spec)
        size = len(request.sequences[index].token_ids)
        unit = None
        if key not in self._flights:
            unit = self._scheduler.admit_late(self._lane, caller.name, Cost(size, size), caller.weight)
        return self._fly(backend, key, request, index, caller, unit)

    def _fly(
        self, backend: Backend, key: Key, request: ScoreRequest, index: int, caller: Caller, unit: Unit | None
    ) -> Flight:
        """A new flight of an admitted unit; without one, the flight that there is."""
        sequence = request.sequences[index]
        if unit is not None:
            flight = self._flights.start(key, self._compute(backend, unit, key, sequence, request.spec, caller), unit)
            self._scheduler.follow(unit, flight.task)
            return flight
        flight = self._flights.join(key)
        label = self._metrics.clients.of(caller.name)
        self._metrics.joined_tokens.labels(label).inc(len(sequence.token_ids))
        self._count_sequences(label, "joined", 1)
        self._usage.of(caller.name).joined_tokens += len(sequence.token_ids)
        self._scheduler.claim(flight.unit, caller.name, caller.weight)
        return flight

    def _count_known(self, request: ScoreRequest, indices: list[int], caller: Caller, tier: str) -> None:
        if not indices:
            return
        tokens = sum(len(request.sequences[index].token_ids) for index in indices)
        label = self._metrics.clients.of(caller.name)
        self._metrics.cached_tokens.labels(label, tier).inc(tokens)
        self._count_sequences(label, tier, len(indices))
        self._usage.of(caller.name).cached_tokens += tokens

    def _count_sequences(self, label: str, source: str, number: int) -> None:
        self._metrics.sequences.labels(label, source).inc(number)
        self._live.sequences[source] += number

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
        metrics, label = self._metrics, self._metrics.clients.of(caller.name)
        waited, turn_at = self._scheduler.waited(unit), time.time()
        metrics.queue_seconds.labels(label, "score").observe(waited)
        size, ran = len(sequence.token_ids), steps.noting()
        try:
            scores = await backend.score(sequence, spec)
            check_scores(scores, sequence, spec, backend.info.hidden_size)
        except TeacherError:
            raise
        except Exception as error:
            log.exception("the engine failed on a sequence of %s (request %s)", caller.name, caller.request_id)
            raise TeacherFailed from error
        finally:
            now = time.time()
            unit.part = Part(turn_at - waited, turn_at, now, caller.request_id, size, ran[0] if ran else None)
            metrics.engine_seconds.labels(label, "score").observe(max(0.0, now - turn_at))
        payer = metrics.clients.of(unit.payer)
        metrics.scored_tokens.labels(payer).inc(size)
        self._count_sequences(payer, "engine", 1)
        self._usage.of(unit.payer).scored_tokens += size
        if scores.hidden_states is None:  # one sequence of them would push out the scores of a thousand others
            self._cache.put(key, scores)
            if self._disk is not None:
                self._disk.put(key, scores)
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
