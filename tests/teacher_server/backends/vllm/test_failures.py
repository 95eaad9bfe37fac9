"""The vLLM teacher as a process whose engine is killed under it: calls end, it comes back, nothing is left over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

from protos.errors import Unavailable
from protos.scores import GenerateRequest, Prompt, Sampling, ScoreRequest, ScoreSpec, Sequence
from student_trainer.teacher_client import connect
from tests.contract.wires import GrpcWire
from tests.servers import ROOT, command, environment, process, wait_for
from tests.teacher_server.backends.vllm.conftest import BATCH_TOKENS, ENGINE

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
START_S = 300.0
"""An engine's start takes a minute on two idle cores."""


def arguments(folder: Path) -> list[str]:
    """The command line of a teacher whose worker is a process of its own, as with several GPUs; it caches nothing."""
    engine = json.dumps(ENGINE | {"distributed_executor_backend": "mp"})
    return [
        *("--backend", "vllm", "--model", str(folder), "--dtype", "float32", "--batch-tokens", str(BATCH_TOKENS)),
        *("--vllm-engine-args", engine, "--no-cache-enabled", "--restart-backoff-s", "0"),
    ]


def processes() -> dict[int, tuple[int, str]]:
    """Parent and command line of every process that has not ended, by its id; proc(5) numbers the fields."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
                if state not in "ZX":
                    line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found[int(folder.name)] = (int(parent), line)
    return found


def below(pid: int) -> dict[int, str]:
    """Command lines of the processes that `pid` started, and those started, by their ids."""
    running = processes()
    found, newest = set[int](), {pid}
    while newest:
        newest = {child for child, (parent, _) in running.items() if parent in newest}
        found |= newest
    return {child: running[child][1] for child in found}


def still_running(pids: set[int]) -> dict[int, tuple[int, str]]:
    return {pid: what for pid, what in processes().items() if pid in pids}


@pytest.mark.parametrize("name", ["EngineCore", pytest.param("Worker", marks=pytest.mark.slow)])
def test_a_killed_engine_fails_its_calls_comes_back_and_leaves_nothing(
    name: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    ids = np.random.default_rng(1).integers(0, 200, 300, dtype=np.int32)
    request = ScoreRequest((Sequence(ids),), ScoreSpec(8))
    long = GenerateRequest((Prompt(token_ids=(1, 2)),), Sampling(500, ignore_eos=True), stream=True)
    seen: set[int] = set()
    with process(tmp_path, *arguments(folder("qwen3")), seconds=START_S) as (server, addresses):
        http = addresses["http"]

        def metric(name: str) -> float:
            (line,) = [line for line in httpx.get(f"{http}/metrics").text.splitlines() if line.startswith(f"{name} ")]
            return float(line.split()[1])

        with (
            closing(GrpcWire(addresses["grpc"], http, timeout=None)) as wire,
            connect(http, patience_s=START_S) as trainer,
            ThreadPoolExecutor(3) as pool,
        ):
            info, (before,) = wire.teacher(), wire.score(request)
            engine = below(server.pid)
            seen |= set(engine)
            (victim,) = [pid for pid, line in engine.items() if name in line]
            os.kill(victim, signal.SIGSTOP)  # so that it is in the middle of the calls when it dies
            calls = pool.submit(wire.score, request), pool.submit(wire.generate, long)
            patient = pool.submit(trainer.score, [Sequence(ids[:100])], ScoreSpec(8))
            wait_for(lambda: metric("teacher_queue_sequences") == 3)
            os.kill(victim, signal.SIGKILL)
            for error in [call.exception(30) for call in calls]:
                assert isinstance(error, Unavailable), error
                assert error.retry_after_s
            assert httpx.get(f"{http}/ready").status_code == 503
            with pytest.raises(Unavailable, match="died and is started again"):
                wire.teacher()
            wait_for(lambda: httpx.get(f"{http}/ready").status_code == 200, START_S)
            assert metric("teacher_engine_restarts_total") == 1
            assert wire.teacher() == info
            (after,) = wire.score(request)
            np.testing.assert_array_equal(after.token_logprobs, before.token_logprobs)
            np.testing.assert_array_equal(after.top_logprobs, before.top_logprobs)
            (alone,) = patient.result(START_S)
            np.testing.assert_allclose(alone.token_logprobs, before.token_logprobs[:99], atol=1e-5)
            assert not still_running(set(engine) - set(below(server.pid)))
        seen |= set(below(server.pid))
        server.terminate()
        assert server.wait(60) == 0
    assert len(seen) >= 4
    wait_for(lambda: not still_running(seen))


@pytest.mark.slow
def test_a_server_that_is_stopped_while_its_engine_starts_leaves_nothing(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    log = tmp_path / "log"
    line = command("--grpc-port", "0", "--http-port", "0", *arguments(folder("qwen3")))
    with log.open("w") as out:
        server = subprocess.Popen(line, env=environment(), stdout=out, stderr=out, cwd=ROOT)
    started: set[int] = set()
    try:
        wait_for(lambda: any("Worker" in line for line in below(server.pid).values()), START_S)
        started = set(below(server.pid))
        server.terminate()
        assert server.wait(60) == 0, log.read_text()
        wait_for(lambda: not still_running(started))
    finally:
        for pid in (server.pid, *still_running(started)):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.wait()
