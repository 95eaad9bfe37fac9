"""Starts each server, offers it every load, and writes down what came of it. Knows no table."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.scoring import machine, processes
from benchmarks.under_load import clients
from benchmarks.under_load.plan import QUEUE_S, THEORY, TINY, Plan

START_S = 180.0
SAMPLE_S = 0.25
MIB = 1 << 20


class Memory:
    """Samples a process's resident memory in a thread."""

    def __init__(self, pid: int) -> None:
        self._process, self._stop = psutil.Process(pid), threading.Event()
        self.samples: list[tuple[float, float]] = []
        """(monotonic seconds, MiB)."""
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.samples.append((time.monotonic(), self._process.memory_info().rss / MIB))

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


@contextmanager
def server(arguments: list[str], work: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """(process id, addresses) of a server process without a cache."""
    ready, log = work / "ready.json", work / "server.log"
    ready.unlink(missing_ok=True)
    common = ["--no-cache-enabled", "--grpc-port", "0", "--http-port", "0", "--ready-file", str(ready)]
    with processes.running([*arguments, *common, "--log-level", "warning"], log) as process:
        processes.wait(process, log, ready.exists, START_S, "the teacher server")
        said = json.loads(ready.read_text("utf-8"))
        yield process.pid, {"grpc": said["grpc"], "http": said["http"]}
        if lines := log.read_text("utf-8", "replace").strip():
            print(f"the server's log says:\n{processes.tail(log)}\n({len(lines.splitlines())} lines)", file=sys.stderr)


def arguments_of(name: str, plan: Plan, work: Path, capacity: float | None) -> list[str]:
    """The command line of a server whose queue holds QUEUE_S seconds of work at `capacity` tokens/s."""
    queue = [] if capacity is None else ["--queue-tokens", str(max(plan.calls[name].total, int(QUEUE_S * capacity)))]
    if name == THEORY:
        batch = str(int(plan.rate / 10))
        return [
            "-m",
            "benchmarks.under_load.server",
            str(plan.rate),
            "--model",
            "theory",
            "--batch-tokens",
            batch,
            *queue,
        ]
    from tests.tiny_qwen3 import make

    model = work / "tiny_qwen3"
    if not model.exists():
        make(model)
    tiny = ["-m", "teacher_server", "--model", str(model), "--dtype", "float32", "--device", "cpu"]
    return [*tiny, "--batch-tokens", "4096", *queue]


def point(pid: int, addresses: dict[str, str], offered: clients.Offer, call: clients.Call) -> dict[str, Any]:
    """One measurement with the CPU it took: cores are CPU seconds by seconds, `others` all other processes' here."""
    own, (server_cpu, _), busy, begun = time.process_time(), processes.cpu_seconds(pid), _busy(), time.monotonic()
    records = asyncio.run(clients.offer(offered, call, addresses, offered.clients))
    took = time.monotonic() - begun
    clients_cores = (time.process_time() - own) / took
    server_cores = (processes.cpu_seconds(pid)[0] - server_cpu) / took
    others = (_busy() - busy) / took - clients_cores - server_cores
    cores = {"clients_cores": clients_cores, "server_cores": server_cores, "others_cores": max(0.0, others)}
    return clients.summary(records, offered, call) | cores


def _busy() -> float:
    """CPU seconds of this machine in which something ran."""
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)


def measure(name: str, plan: Plan, work: Path) -> dict[str, Any]:
    """Everything of one server."""
    call, capacity = plan.calls[name], plan.rate
    if name == TINY:
        with server(arguments_of(name, plan, work, None), work) as (_, addresses):
            capacity = asyncio.run(clients.saturate(call, addresses, 8, plan.warm_s, plan.capacity_s))
    rows: list[dict[str, Any]] = []
    with server(arguments_of(name, plan, work, capacity), work) as (pid, addresses), Memory(pid) as memory:
        for number in plan.clients:
            for load in plan.loads:
                offered = clients.Offer(number, load * capacity, plan.warm_s, plan.seconds_for(name, number))
                rows.append({"load": load} | point(pid, addresses, offered, call))
                print(name, json.dumps(rows[-1]), file=sys.stderr, flush=True)
        offered = clients.Offer(32, 4 * capacity, plan.warm_s, plan.steady_s)
        begun = time.monotonic() + plan.warm_s
        steady = point(pid, addresses, offered, call)
        samples = [sample for sample in memory.samples if begun <= sample[0] <= begun + plan.steady_s]
        found = memory_summary(samples) | {"calls": steady["answered"] + steady["refused"]}
        found["first_mib"] = memory.samples[0][1]
    return {"capacity": capacity, "call": asdict(call), "rows": rows, "steady": steady, "memory": found}


def memory_summary(samples: list[tuple[float, float]]) -> dict[str, float]:
    """The line through (seconds, MiB) samples, and the medians of their first and last third."""
    at, mib = np.array(samples).T
    third = max(1, len(mib) // 3)
    slope = float(np.polyfit(at - at[0], mib, 1)[0])
    begin, end = float(np.median(mib[:third])), float(np.median(mib[-third:]))
    return {"slope_mib_per_minute": 60 * slope, "begin_mib": begin, "end_mib": end, "growth": end / begin - 1}


def everything(plan: Plan, names: list[str], work: Path) -> dict[str, Any]:
    """The result of a whole run."""
    begun = time.monotonic()
    servers = {name: measure(name, plan, work) for name in names}
    others = [row["others_cores"] for server in servers.values() for row in server["rows"]]
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine.describe() | {"others_cores": float(np.median(others))},
        "plan": asdict(plan) | {"queue_s": QUEUE_S},
        "servers": servers,
        "took_s": time.monotonic() - begun,
    }
