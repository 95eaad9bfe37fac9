"""Whether one client that sends 64 times more hurts eight polite ones: the real service before an engine of set speed.

Time is virtual (tests/virtual_time.py) and the engine theoretical, so every number is exact and the same each time.
`polite` clients keep one call in flight, `greedy` 64. Latency is compared with that of the same polite clients without
the greedy one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from protos.errors import Overloaded
from protos.scores import GenerateRequest, Prompt, Sampling, ScoreRequest, Sequence
from teacher_server.auth import Caller
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.theoretical_backend import Behaviour, TheoreticalBackend
from teacher_server.metrics import Metrics
from teacher_server.service import ServiceSettings, TeacherService
from tests.virtual_time import run

RATE = 2_000
"""Tokens that the engine does in a second."""
BATCH = 200
WARM_S = 3.0
POLITE = [f"polite {i}" for i in range(8)]


@dataclass
class Seen:
    """What the clients saw after the first WARM_S seconds."""

    tokens: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    latencies: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    refused: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    retry_s: list[float] = field(default_factory=list)

    def p99(self, names: list[str]) -> float:
        """Seconds of the slowest call but one in a hundred."""
        return float(np.quantile([s for name in names for s in self.latencies[name]], 0.99))

    def jain(self) -> float:
        """Jain's index over the served tokens of all clients; 1 is equal."""
        x = np.array(list(self.tokens.values()), float)
        return float(x.sum() ** 2 / (len(x) * (x**2).sum()))


Call = Callable[[int], ScoreRequest | GenerateRequest]


def scoring(sequences: int, length: int) -> Call:
    """Calls of new sequences, each scored at its last position alone, which costs the engine all the same."""

    def call(serial: int) -> ScoreRequest:
        ids = np.random.default_rng(serial).integers(0, 250, (sequences, length))
        return ScoreRequest(tuple(Sequence(row, length - 1) for row in ids))

    return call


def generation(prompts: int, new_tokens: int) -> Call:
    """Calls of prompts of 8 tokens."""

    def call(serial: int) -> GenerateRequest:
        ids = np.random.default_rng(serial).integers(0, 250, (prompts, 8))
        return GenerateRequest(tuple(Prompt(token_ids=row) for row in ids), Sampling(new_tokens, ignore_eos=True))

    return call


@dataclass
class Client:
    """One client: so many calls in flight, each followed by the next."""

    name: str
    call: Call
    in_flight: int = 1


def watch(clients: list[Client], seconds: float, settings: ServiceSettings | None = None) -> Seen:
    """Lets clients call for WARM_S and then that many virtual seconds."""
    seen, serial = Seen(), itertools.count()

    async def worker(service: TeacherService, client: Client) -> None:
        loop = asyncio.get_running_loop()
        while True:
            request, began = client.call(next(serial)), loop.time()
            caller = Caller(client.name)
            try:
                if isinstance(request, ScoreRequest):
                    async for index, _ in service.score(request, caller):
                        count(client.name, len(request.sequences[index].token_ids))
                else:
                    async for deltas in service.generate(request, caller):
                        prompts = [d.prompt_token_ids for d in deltas if d.prompt_token_ids is not None]
                        count(client.name, sum(len(ids) for ids in (*prompts, *(d.token_ids for d in deltas))))
            except Overloaded as error:
                seen.retry_s.append(error.retry_after_s or 0.0)
                seen.refused[client.name] += 1
                await asyncio.sleep(seen.retry_s[-1])
            else:
                if began >= WARM_S:
                    seen.latencies[client.name].append(loop.time() - began)

    def count(name: str, tokens: int) -> None:
        if asyncio.get_running_loop().time() >= WARM_S:
            seen.tokens[name] += tokens

    async def main() -> None:
        loop = asyncio.get_running_loop()
        backend = TheoreticalBackend(
            BackendOptions(model="theory", batch_tokens=BATCH), Behaviour(tokens_per_second=RATE)
        )
        await backend.start()
        service = TeacherService(settings or ServiceSettings(), Metrics(), clock=loop.time)
        backend.observe(service.observe_step)
        await service.attach(backend)
        tasks = [asyncio.create_task(worker(service, c)) for c in clients for _ in range(c.in_flight)]
        done, _ = await asyncio.wait(tasks, timeout=WARM_S + seconds, return_when=asyncio.FIRST_EXCEPTION)
        for task in done:
            task.result()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(main())
    return seen


def hard(*values: Any) -> Any:
    """A case that takes long."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("polite", "greedy", "seconds"),
    [
        (scoring(4, 25), scoring(4, 25), 8.0),
        hard(scoring(4, 25), scoring(1, 400), 12.0),
        hard(scoring(1, 200), scoring(32, 5), 15.0),
        hard(scoring(4, 25), generation(16, 10), 15.0),
        hard(generation(1, 10), generation(1, 40), 3.0),
        hard(generation(4, 10), generation(4, 40), 4.0),
        hard(generation(8, 10), generation(8, 40), 6.0),
    ],
    ids=[
        *("equal calls", "long against short", "short against long", "generating against scoring"),
        *("generating 1 prompt a call", "generating 4 prompts a call", "generating 8 prompts a call"),
    ],
)
def test_eight_polite_clients_do_not_feel_one_that_sends_64_times_more(
    polite: Call, greedy: Call, seconds: float
) -> None:
    everyone = [Client(name, polite) for name in POLITE]
    solo = watch(everyone, seconds)
    seen = watch([*everyone, Client("greedy", greedy, in_flight=64)], seconds)
    assert seen.jain() >= 0.95, dict(seen.tokens)
    assert seen.p99(POLITE) <= 2 * solo.p99(POLITE)


def test_beyond_the_queue_only_the_greedy_client_is_refused_and_told_when_there_is_room() -> None:
    """9,600 tokens of calls before a queue of 2,000: after what it is told the next attempt may come too early, but
    the engine is never without work, and nobody else notices."""
    polite = [Client(name, scoring(1, 25)) for name in POLITE]
    greedy = Client("greedy", scoring(4, 50), in_flight=48)
    seen = watch([*polite, greedy], 3.0, ServiceSettings(queue_tokens=2000))
    assert set(seen.refused) == {"greedy"}
    assert sum(seen.tokens.values()) == pytest.approx(RATE * 3.0, rel=0.02)
    assert all(seen.tokens[name] == pytest.approx(seen.tokens["polite 0"], rel=0.1) for name in POLITE)
    told = np.array(seen.retry_s)
    assert told.min() >= 0.2
    assert told.max() <= 2.0, "2,000 tokens drain in a second"
