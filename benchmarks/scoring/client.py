"""A trainer's end of the wire: one process that asks a server for scores, round by round, when it is told to.

`serve` is the process's main function. Teachers are asked through the project's own client; vLLM's own server through
plain HTTP and JSON, as its users do. It knows nothing of how servers are started.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np

from benchmarks.scoring.work import KINDS, Load, Skipped

VLLM_TOP = 64


@dataclass(frozen=True)
class Job:
    """What one client process does in every round: calls of `load`, `in_flight` at the same time, to `address`.

    `kind` names the question; None asks vLLM's own server for the top 64 of every position.
    """

    address: str
    kind: str | None
    load: Load
    in_flight: int
    model: str = ""


@dataclass(frozen=True)
class Sample:
    """What one client measured in one round: monotonic times that all processes of a machine share, and counts."""

    start: float
    end: float
    cpu_s: float
    tokens: int
    positions: int
    received: int = 0
    """Bytes of the answers, where the driver sees them."""


class Driver(Protocol):
    """One way to ask."""

    def prepare(self, seed: int, calls: int) -> None:
        """Makes the sequences of a round."""
        ...

    def run(self) -> tuple[int, int, int]:
        """Asks; (tokens, positions, received bytes)."""
        ...

    def close(self) -> None:
        """Ends connections."""
        ...


class TeacherDriver:
    """Asks a teacher through `student_trainer.teacher_client`; results are dropped as they come, in order."""

    def __init__(self, job: Job, name: str) -> None:
        from student_trainer.teacher_client import connect

        self._load, self._kind = job.load, KINDS[job.kind or ""]
        self._client = connect(job.address, max_in_flight=job.in_flight, patience_s=10, timeout_s=300, name=name)
        self._spec = self._kind.spec(self._client.teacher())
        self._calls: list[Any] = []

    def prepare(self, seed: int, calls: int) -> None:
        """See Driver."""
        size = self._load.per_call
        sequences = self._load.sequences(seed, calls * size, self._kind.candidates)
        self._calls = [sequences[first : first + size] for first in range(0, len(sequences), size)]

    def run(self) -> tuple[int, int, int]:
        """See Driver."""
        waiting: deque[Future[Any]] = deque(self._client.submit_score(call, self._spec) for call in self._calls)
        positions = 0
        while waiting:
            positions += sum(scores.positions for scores in waiting.popleft().result())
        return sum(len(s.token_ids) for call in self._calls for s in call), positions, 0

    def close(self) -> None:
        """See Driver."""
        self._client.close()


class OpenAIDriver:
    """Asks vLLM's own server for `prompt_logprobs` and reads the JSON into Python objects, one sequence a call."""

    def __init__(self, job: Job) -> None:
        import httpx

        self._load, self._model = job.load, job.model
        self._http = httpx.Client(base_url=job.address, timeout=300, trust_env=False)
        self._pool = ThreadPoolExecutor(job.in_flight)
        self._bodies: list[dict[str, Any]] = []

    def prepare(self, seed: int, calls: int) -> None:
        """See Driver."""
        asked = {"model": self._model, "max_tokens": 1, "temperature": 0, "prompt_logprobs": VLLM_TOP}
        self._bodies = [asked | {"prompt": ids.tolist()} for ids in self._load.ids(seed, calls)]

    def run(self) -> tuple[int, int, int]:
        """See Driver."""
        found = list(self._pool.map(self._ask, self._bodies))
        return len(found) * self._load.tokens, sum(n for n, _ in found), sum(size for _, size in found)

    def _ask(self, body: dict[str, Any]) -> tuple[int, int]:
        response = self._http.post("/v1/completions", json=body)
        if response.status_code != 200:
            raise RuntimeError(f"vLLM's server answered {response.status_code}: {response.text[:300]}")
        rows = json.loads(response.content)["choices"][0]["prompt_logprobs"]
        return sum(row is not None for row in rows), len(response.content)

    def close(self) -> None:
        """See Driver."""
        self._pool.shutdown()
        self._http.close()


def serve(pipe: Connection, job: Job, number: int) -> None:
    """Answers ("prepare", seed, calls) with "ready", ("go", time) with a Sample, until None; sends what went wrong."""
    try:
        driver: Driver = OpenAIDriver(job) if job.kind is None else TeacherDriver(job, f"client-{number}")
        pipe.send("open")
        while (order := pipe.recv()) is not None:
            if order[0] == "prepare":
                driver.prepare(order[1] + 1_000_003 * number, order[2])
                pipe.send("ready")
            else:
                pipe.send(_timed(driver.run, order[1]))
        driver.close()
    except Skipped as error:
        pipe.send(error)
    except Exception as error:  # noqa: BLE001 - it becomes the row's note in the other process
        pipe.send(RuntimeError(f"client {number}: {type(error).__name__}: {error}"))


def _timed(run: Callable[[], tuple[int, int, int]], at: float) -> Sample:
    time.sleep(max(0.0, at - time.monotonic()))
    start, cpu = time.monotonic(), time.process_time()
    tokens, positions, received = run()
    return Sample(start, time.monotonic(), time.process_time() - cpu, tokens, positions, received)


def random_seed() -> int:
    """A seed that no earlier run used, so that nobody's cache can know its sequences."""
    return int(np.random.SeedSequence().generate_state(1)[0])
