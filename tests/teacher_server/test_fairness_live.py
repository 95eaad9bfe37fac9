"""The same bar with real clients of a real server, in tokens that each was served while all of them were calling."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from protos.errors import Overloaded, Unavailable
from protos.scores import ScoreRequest, Sequence
from teacher_server.backends.theoretical_backend import Behaviour
from tests.contract.wires import WIRES
from tests.servers import serving, theory, wait_for

POLITE = [f"polite {i}" for i in range(8)]
ENOUGH = 60_000
"""Tokens that the engine scores while it is watched."""


@pytest.mark.slow
def test_eight_clients_get_their_part_beside_one_with_64_calls_at_a_time() -> None:
    behaviour = Behaviour(tokens_per_second=6_000)
    with serving(theory(behaviour, batch_tokens=500), cache={"enabled": False}) as server:
        stop = threading.Event()

        def client(name: str, number: int) -> None:
            wire = WIRES["grpc" if number % 2 else "http"](server.grpc, server.http, client=name)
            rng = np.random.default_rng(number)
            while not stop.is_set():
                rows = rng.integers(0, 250, (4, 50))
                try:
                    wire.score(ScoreRequest(tuple(Sequence(row, 49) for row in rows)))
                except (Overloaded, Unavailable) as error:
                    stop.wait(error.retry_after_s)
            wire.close()

        def served() -> dict[str, int]:
            return {name: usage.scored_tokens for name, usage in server.app.service.usage.all().items()}

        names = [*POLITE, *["greedy"] * 64]
        with ThreadPoolExecutor(len(names)) as pool:
            clients = [pool.submit(client, name, number) for number, name in enumerate(names)]
            wait_for(lambda: sum(served().values()) > ENOUGH // 4)
            before = served()
            wait_for(lambda: sum(served().values()) - sum(before.values()) > ENOUGH)
            after = served()
            stop.set()
            for ended in clients:
                ended.result()
        x = np.array([after[name] - before[name] for name in (*POLITE, "greedy")], float)
        assert x.sum() ** 2 / (9 * (x**2).sum()) >= 0.95, x
