"""A teacher that is killed, stopped or raises under its clients: they wait, and get the same answers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from protos.scores import Scores, ScoreSpec, Sequence
from student_trainer.teacher_client import TeacherClient, connect
from teacher_server.backends.factory import make_backend
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.transformers_backend import TransformersBackend
from tests.servers import ROOT, command, environment, serving, wait_for
from tests.tiny_qwen3 import make

CALLS, AT_ONCE = 60, 6


def asked(client: TeacherClient, number: int) -> list[npt.NDArray[Any]]:
    """The arrays of one call, whose sequences come from its number."""
    rng = np.random.default_rng(number)
    rows = [Sequence(rng.integers(0, 240, 20).astype(np.int32)) for _ in range(2)]
    found: list[Scores] = client.score(rows, ScoreSpec(4))
    return [array for one in found for array in one.arrays().values()]


class Teacher:
    """A theoretical teacher in a process, always on the same ports."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._ports = ["0", "0"]
        self.start()

    def start(self) -> None:
        """Starts it, again where it was killed."""
        self._number += 1
        ready = self._folder / f"ready{self._number}.json"
        ports = ("--grpc-port", self._ports[0], "--http-port", self._ports[1], "--no-cache-enabled")
        line = command("--backend", "theoretical", "--model", "theory", *ports, "--ready-file", str(ready))
        with (self._folder / f"log{self._number}").open("w") as log:
            self.process = subprocess.Popen(line, env=environment(), stderr=log, stdout=log, cwd=ROOT)
        wait_for(lambda: ready.exists() or self.process.poll() is not None)
        self.addresses = json.loads(ready.read_text())
        self._ports = [self.addresses[name].rpartition(":")[2] for name in ("grpc", "http")]

    def kill(self) -> None:
        """Ends it without a word, and starts it again."""
        self.process.kill()
        self.process.wait()
        self.start()

    def stop_for_a_while(self) -> None:
        """Keeps it from running, its connections open."""
        os.kill(self.process.pid, signal.SIGSTOP)
        threading.Event().wait(1.0)
        os.kill(self.process.pid, signal.SIGCONT)


@pytest.mark.parametrize("transport", ["grpc", pytest.param("http", marks=pytest.mark.slow)])
@pytest.mark.parametrize("what", [Teacher.kill, Teacher.stop_for_a_while], ids=["killed", "stopped"])
def test_a_process_that_dies_or_stands_still_costs_time_and_no_bit(
    tmp_path: Path, what: Callable[[Teacher], None], transport: str
) -> None:
    teacher = Teacher(tmp_path)
    try:
        with connect(teacher.addresses[transport], patience_s=60, max_in_flight=AT_ONCE) as client:
            right = [asked(client, number) for number in range(CALLS)]
            done, half = [0], threading.Event()

            def one(number: int) -> list[npt.NDArray[Any]]:
                found = asked(client, number)
                done[0] += 1
                if done[0] > CALLS // 4:
                    half.set()
                return found

            with ThreadPoolExecutor(AT_ONCE) as pool:
                calls = [pool.submit(one, number) for number in range(CALLS)]
                assert half.wait(60)
                what(teacher)
                answers = [call.result(60) for call in calls]
    finally:
        teacher.process.kill()
        teacher.process.wait()
    for before, after in zip(right, answers, strict=True):
        for a, b in zip(before, after, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_an_engine_that_raises_now_and_then_is_down_for_its_clients_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of the device ends the engine's thread; another engine is started."""
    import torch

    from teacher_server.backends.scorer import Scorer

    real, steps = Scorer._forward, [0]

    def forward(self: Scorer, jobs: list[Any]) -> Any:
        steps[0] += 1
        if steps[0] in (2, 6):
            raise torch.AcceleratorError("device lost")
        return real(self, jobs)

    options = BackendOptions(str(make(tmp_path / "model")), dtype="float32", device="cpu")
    restart = {"backoff_s": 0.0, "attempts": 10}
    with serving(lambda: make_backend(options), restart=restart, cache={"enabled": False}) as server:
        with connect(server.grpc, patience_s=60) as client:
            right = [asked(client, number) for number in range(6)]
            monkeypatch.setattr(Scorer, "_forward", forward)
            again = [asked(client, number) for number in range(6)]
        assert server.metric("teacher_engine_restarts_total") == 2
        assert isinstance(server.backend, TransformersBackend)
        wait_for(lambda: server.metric("teacher_queue_tokens") == 0)
    for before, after in zip(right, again, strict=True):
        for a, b in zip(before, after, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
