"""An engine core that stands still without dying: seen, taken back where it goes on by itself, replaced where not."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos.errors import DeadlineExceeded, Unavailable
from protos.scores import GenerateRequest, Prompt, Sampling, ScoreRequest, ScoreSpec, Sequence
from tests.contract.wires import GrpcWire
from tests.servers import process, wait_for
from tests.teacher_server.backends.vllm.test_failures import START_S, arguments, below, still_running

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1200)]
STEP_S, CANARY_S = 30, 2
SEEN_S = 4 * CANARY_S + 10.0
"""Seconds in which a stopped engine is not ready any more, or is again; the server looks twice a second."""
REPLACED_S = STEP_S + START_S


def test_a_stopped_engine_core_is_not_ready_comes_back_by_itself_or_is_replaced(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    ids = np.random.default_rng(1).integers(0, 200, 300, dtype=np.int32)
    request = ScoreRequest((Sequence(ids),), ScoreSpec(8))
    long = GenerateRequest((Prompt(token_ids=(1, 2)),), Sampling(500, ignore_eos=True), stream=True)
    watch = ("--watch-step-s", str(STEP_S), "--watch-canary-s", str(CANARY_S))
    line = (*arguments(folder("qwen3")), *watch)
    with process(tmp_path, *line, seconds=START_S) as (server, addresses):
        http = addresses["http"]

        def restarts() -> float:
            lines = httpx.get(f"{http}/metrics").text.splitlines()
            (line,) = [line for line in lines if line.startswith("teacher_engine_restarts_total ")]
            return float(line.split()[1])

        def core() -> int:
            (pid,) = [pid for pid, line in below(server.pid).items() if "EngineCore" in line]
            return pid

        with (
            closing(GrpcWire(addresses["grpc"], http, timeout=None)) as wire,
            closing(GrpcWire(addresses["grpc"], http, timeout=1.0)) as hurried,
            grpc.insecure_channel(addresses["grpc"]) as channel,
            ThreadPoolExecutor(2) as pool,
        ):
            health = health_pb2_grpc.HealthStub(channel)

            def ready(wanted: bool) -> bool:
                time.sleep(0.5)  # the engine needs the cores
                status = health.Check(health_pb2.HealthCheckRequest(), timeout=10).status
                serving = status == health_pb2.HealthCheckResponse.SERVING
                answer = httpx.get(f"{http}/ready").status_code
                assert answer in (200, 503)
                return serving is wanted and (answer == 200) is wanted

            (before,) = wire.score(request)
            first, everything = core(), set(below(server.pid))

            os.kill(first, signal.SIGSTOP)  # idle; only a canary can notice
            wait_for(lambda: ready(False), SEEN_S)
            with pytest.raises(DeadlineExceeded):
                hurried.score(request)
            patient = pool.submit(wire.score, request)
            os.kill(first, signal.SIGCONT)
            (late,) = patient.result(SEEN_S)
            wait_for(lambda: ready(True), SEEN_S)
            assert (core(), restarts()) == (first, 0)

            calls = pool.submit(wire.score, request), pool.submit(wire.generate, long)
            os.kill(first, signal.SIGSTOP)
            wait_for(lambda: ready(False), SEEN_S)
            assert not any(call.done() for call in calls)
            for error in [call.exception(STEP_S + 10) for call in calls]:
                assert isinstance(error, Unavailable), error
                assert error.retry_after_s
            wait_for(lambda: ready(True), REPLACED_S)
            assert restarts() == 1
            assert core() != first
            assert not still_running(everything - set(below(server.pid)))
            (after,) = wire.score(request)
        for other in (late, after):
            np.testing.assert_array_equal(other.token_logprobs, before.token_logprobs)
            np.testing.assert_array_equal(other.top_logprobs, before.top_logprobs)
        server.terminate()
        assert server.wait(60) == 0
    log = (tmp_path / "log").read_text()
    assert f"calls and has finished no step for {STEP_S} s; it is taken for hung" in log
