"""K clients that offer a teacher work at a given rate, whatever it answers, and count what comes of it.

An open loop: a call goes out when it is due and not when the one before has ended, and a refused call is not repeated,
so that the offered load is what it is said to be. All clients run on one event loop. Knows no server.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.under_load.calls import OK, OVERLOADED, Caller, GrpcCaller, HttpCaller
from protos import codec
from protos.scores import ScoreRequest, ScoreSpec, Sequence

ENOUGH = 4
"""Answered calls of each client from which their shares say something; a call is not divided."""


@dataclass(frozen=True)
class Call:
    """Every call: so many sequences of so many random tokens, with the teacher's `top_k` best at each position."""

    sequences: int
    tokens: int
    vocab: int
    top_k: int = 8

    @property
    def total(self) -> int:
        """Its tokens."""
        return self.sequences * self.tokens

    def message(self, rng: np.random.Generator) -> bytes:
        """One that no other call equals."""
        rows = rng.integers(0, self.vocab, (self.sequences, self.tokens), dtype=np.int32)
        request = ScoreRequest(tuple(Sequence(row) for row in rows), ScoreSpec(self.top_k))
        (message,) = codec.encode_score_request(request)
        return bytes(message.SerializeToString())


@dataclass(frozen=True)
class Record:
    """How one call went: when it was due, sent and answered (monotonic seconds), and how."""

    client: int
    due: float
    sent: float
    end: float
    outcome: str


@dataclass(frozen=True)
class Offer:
    """What K clients offer together, in tokens/s, for `seconds` after `warm_s`."""

    clients: int
    rate: float
    warm_s: float
    seconds: float


def callers(clients: int, addresses: dict[str, str]) -> list[Caller]:
    """Every fourth client over HTTP, the others over gRPC."""
    return [
        HttpCaller(addresses["http"], f"client-{i}") if i % 4 == 3 else GrpcCaller(addresses["grpc"], f"client-{i}")
        for i in range(clients)
    ]


async def offer(asked: Offer, call: Call, addresses: dict[str, str], seed: int) -> list[Record]:
    """Every call's record, also of those before and after the measured time."""
    rng = np.random.default_rng(seed)
    people = callers(asked.clients, addresses)
    interval = asked.clients * call.total / asked.rate
    begin = time.monotonic() + 0.2
    end = begin + asked.warm_s + asked.seconds
    records: list[Record] = []
    running: set[asyncio.Task[None]] = set()

    async def one(client: int, due: float) -> None:
        message = call.message(rng)
        sent = time.monotonic()
        outcome = await people[client].score(message, call.sequences)
        records.append(Record(client, due, sent, time.monotonic(), outcome))

    async def person(client: int) -> None:
        number, phase = 0, float(rng.random())
        while (due := begin + (number + phase + float(rng.uniform(-0.3, 0.3))) * interval) < end:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(one(client, due))
            running.add(task)
            task.add_done_callback(running.discard)
            number += 1

    async with asyncio.TaskGroup() as group:
        for client in range(asked.clients):
            group.create_task(person(client))
    if running:
        await asyncio.gather(*running)
    for caller in people:
        await caller.close()
    return records


async def saturate(call: Call, addresses: dict[str, str], in_flight: int, warm_s: float, seconds: float) -> float:
    """Tokens/s of a closed loop with so many calls in flight: the capacity of an engine whose speed is not set."""
    rng, caller = np.random.default_rng(0), GrpcCaller(addresses["grpc"], "capacity")
    begin = time.monotonic() + warm_s
    done = 0

    async def worker() -> None:
        nonlocal done
        while time.monotonic() < begin + seconds:
            outcome = await caller.score(call.message(rng), call.sequences)
            if outcome != OK:
                raise RuntimeError(f"a call of the closed loop ended with {outcome}")
            done += call.total * (begin <= time.monotonic() < begin + seconds)

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    await caller.close()
    return done / seconds


def summary(records: list[Record], asked: Offer, call: Call) -> dict[str, Any]:
    """What the measured time held; times in milliseconds, rates in tokens/s, None where nothing was of that kind."""
    end = max(record.due for record in records)
    first = end - asked.seconds
    served = [r for r in records if r.outcome == OK and first <= r.end < end]
    sent = [r for r in records if first <= r.due < end]
    refused = [r for r in sent if r.outcome == OVERLOADED]
    by_client = np.bincount([r.client for r in served], minlength=asked.clients) * float(call.total)
    return {
        "clients": asked.clients,
        "offered": len(sent) * call.total / asked.seconds,
        "goodput": len(served) * call.total / asked.seconds,
        "answered": len(served),
        "refused": len(refused),
        "failed": dict(Counter(r.outcome for r in records if r.outcome not in (OK, OVERLOADED))),
        "refused_p50_ms": _percentile([r.end - r.sent for r in refused], 50),
        "refused_p99_ms": _percentile([r.end - r.sent for r in refused], 99),
        "served_p50_ms": _percentile([r.end - r.sent for r in served], 50),
        "served_p99_ms": _percentile([r.end - r.sent for r in served], 99),
        "late_p99_ms": _percentile([r.sent - r.due for r in sent], 99),
        "jain": jain(by_client) if len(served) >= ENOUGH * asked.clients else None,
    }


def jain(x: npt.NDArray[Any]) -> float:
    """(sum x)^2 / (n sum x^2), 1 where all have the same (Jain, Chiu and Hawe, "A quantitative measure of fairness",
    1984); 0 where nobody had anything."""
    return float(x.sum() ** 2 / (len(x) * (x**2).sum())) if x.any() else 0.0


def _percentile(seconds: list[float], q: float) -> float | None:
    return float(np.percentile(seconds, q)) * 1e3 if seconds else None
