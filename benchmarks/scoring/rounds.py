"""Rounds of one row: clients in processes of their own start together, and a round's rate is all tokens over all time.

Knows clients and clocks, no server; whoever starts one hands in its process id for the CPU time.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.scoring.client import Job, Sample, random_seed, serve
from benchmarks.scoring.processes import Failed, cpu_seconds
from benchmarks.scoring.work import Skipped

OPEN_S, ROUND_S, END_S = 60.0, 300.0, 5.0
TOGETHER_S = 0.2
"""Time from the word to the start, so that every client has heard it."""


@dataclass(frozen=True)
class Round:
    """All clients of one round. CPU is in cores: CPU seconds by seconds of the round."""

    tokens_per_s: float
    seconds: float
    tokens: int
    positions: int
    received: int
    server_cores: float
    engine_cores: float
    clients_cores: float


class Clients:
    """Client processes that wait for the next round; made by `clients`."""

    def __init__(self, pipes: list[Connection], job: Job) -> None:
        self._pipes = pipes
        self._job = job
        self._seed = random_seed()
        self._answers("open", OPEN_S)

    def round(self, calls: int, server_pid: int) -> Round:
        """One round of `calls` calls from each client, on sequences that nobody has seen."""
        self._seed += 10_007
        self._tell(("prepare", self._seed, calls))
        self._answers("ready", ROUND_S)
        before = cpu_seconds(server_pid)
        self._tell(("go", time.monotonic() + TOGETHER_S))
        samples: list[Sample] = self._answers(None, ROUND_S)
        after = cpu_seconds(server_pid)
        seconds = max(s.end for s in samples) - min(s.start for s in samples)
        tokens = sum(s.tokens for s in samples)
        return Round(
            tokens_per_s=tokens / seconds,
            seconds=seconds,
            tokens=tokens,
            positions=sum(s.positions for s in samples),
            received=sum(s.received for s in samples),
            server_cores=(after[0] - before[0]) / seconds,
            engine_cores=(after[1] - before[1]) / seconds,
            clients_cores=sum(s.cpu_s for s in samples) / seconds,
        )

    def _tell(self, order: Any) -> None:
        for pipe in self._pipes:
            pipe.send(order)

    def _answers(self, expected: str | None, seconds: float) -> list[Any]:
        end = time.monotonic() + seconds
        found = []
        for number, pipe in enumerate(self._pipes):
            if not pipe.poll(max(0.0, end - time.monotonic())):
                raise Failed(f"client {number} did not answer within {seconds:.0f} s")
            try:
                answer = pipe.recv()
            except EOFError:
                raise Failed(f"client {number} ended without a word") from None
            if isinstance(answer, Skipped):
                raise answer
            if isinstance(answer, Exception):
                raise Failed(str(answer))
            assert expected in (None, answer)
            found.append(answer)
        return found


@contextmanager
def clients(job: Job, count: int) -> Iterator[Clients]:
    """`count` client processes, connected; they have ended at the end."""
    context = multiprocessing.get_context("spawn")
    pairs = [context.Pipe() for _ in range(count)]
    processes = [
        context.Process(target=serve, args=(theirs, job, number), daemon=True)
        for number, (_, theirs) in enumerate(pairs)
    ]
    try:
        for process, (_, theirs) in zip(processes, pairs, strict=True):
            process.start()
            theirs.close()
        yield Clients([ours for ours, _ in pairs], job)
    finally:
        for ours, _ in pairs:
            with suppress(OSError):  # a client that has ended already
                ours.send(None)
        for process in processes:
            process.join(END_S)
            process.terminate()
            process.join()
        for ours, _ in pairs:
            ours.close()


def calls_for(rate: float, seconds: float, count: int, job: Job) -> int:
    """Calls of each of `count` clients for about `seconds` at `rate` tokens/s, at least one more than in flight."""
    wanted = rate * seconds / (count * job.load.call_tokens)
    return max(job.in_flight + 1, math.ceil(wanted))


def measure(job: Job, count: int, server_pid: int, *, seconds: float, repeats: int) -> list[Round]:
    """The rounds of one row after a warm-up; the first rounds' rates say how much the next ones ask for."""
    with clients(job, count) as group:
        rate = group.round(job.in_flight, server_pid).tokens_per_s
        found: list[Round] = []
        for _ in range(repeats):
            found.append(group.round(calls_for(rate, seconds, count, job), server_pid))
            rate = found[-1].tokens_per_s
    return found


def summary(rounds: list[Round]) -> dict[str, Any]:
    """Medians over the rounds, and the lowest and highest rate."""
    rates = [r.tokens_per_s for r in rounds]
    medians = {
        name: statistics.median(getattr(r, name) for r in rounds)
        for name in ("tokens_per_s", "seconds", "server_cores", "engine_cores", "clients_cores")
    }
    counts = {name: sum(getattr(r, name) for r in rounds) for name in ("tokens", "positions", "received")}
    return {**medians, "lowest": min(rates), "highest": max(rates), "rates": rates, **counts}
