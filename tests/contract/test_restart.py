"""What clients see when an engine dies: Unavailable at once, not ready, the same answers again after its restart."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import errors
from protos.scores import GenerateRequest, Prompt, Sampling, ScoreRequest, ScoreSpec, Sequence
from student_trainer.teacher_client import connect
from teacher_server.backends.theoretical_backend import Behaviour
from tests.contract.wires import WIRES, GrpcWire, Wire
from tests.servers import ROOT, Server, environment, serving, theory, wait_for

CRASH, VANISH, HANG = 240, 241, 244
DEADLY = Behaviour(crashing_id=CRASH, vanishing_id=VANISH, hanging_id=HANG)
STATUS = health_pb2.HealthCheckResponse
AT_ONCE: dict[str, Any] = {"restart": {"backoff_s": 0.0, "attempts": 100}}
LATER: dict[str, Any] = {"restart": {"backoff_s": 30.0}}
GOOD = ScoreRequest((Sequence([1, 2, 3, 4]),), ScoreSpec(2))


@pytest.fixture(scope="module")
def mortal() -> Iterator[Server]:
    """A teacher that is back at once."""
    with serving(theory(DEADLY), **AT_ONCE) as server:
        yield server


@pytest.fixture(params=list(WIRES))
def mortal_wire(request: pytest.FixtureRequest, mortal: Server) -> Iterator[Wire]:
    """Each transport to it."""
    made = WIRES[request.param](mortal.grpc, mortal.http)
    yield made
    made.close()


def ready(server: Server) -> bool:
    return httpx.get(f"{server.http}/ready").status_code == 200


def prompt(*ids: int, max_tokens: int = 3) -> GenerateRequest:
    return GenerateRequest((Prompt(token_ids=ids),), Sampling(max_tokens, seed=1, ignore_eos=True), stream=True)


@pytest.mark.parametrize("way", [CRASH, VANISH], ids=["with a word", "in silence"])
@pytest.mark.parametrize("method", ["score", "generate"])
def test_calls_in_flight_are_unavailable_and_the_same_calls_work_again(
    mortal: Server, mortal_wire: Wire, method: str, way: int
) -> None:
    wait_for(lambda: ready(mortal))
    info = mortal_wire.teacher()
    before = mortal_wire.score(GOOD)[0], mortal_wire.generate(prompt(5, 6))[0][0]
    lives = len(mortal.backends)
    restarts = mortal.metric("teacher_engine_restarts_total")

    def call(*ids: int) -> None:
        if method == "score":
            mortal_wire.score(ScoreRequest((Sequence(ids),)))
        else:
            mortal_wire.generate(prompt(*ids))

    with ThreadPoolExecutor(2) as pool:
        begun = mortal.backend.counters.scored + mortal.backend.counters.generated
        waiting = pool.submit(call, 1, HANG)
        wait_for(lambda: mortal.backend.counters.scored + mortal.backend.counters.generated == begun + 1)
        dying = pool.submit(call, 1, way)
        for error in (waiting.exception(), dying.exception()):
            assert isinstance(error, errors.Unavailable), error
            assert error.retry_after_s
    wait_for(lambda: ready(mortal))
    assert len(mortal.backends) == lives + 1
    assert mortal.metric("teacher_engine_restarts_total") == restarts + 1
    assert mortal_wire.teacher() == info
    after = mortal_wire.score(GOOD)[0], mortal_wire.generate(prompt(5, 6))[0][0]
    np.testing.assert_array_equal(after[0].top_logprobs, before[0].top_logprobs)
    np.testing.assert_array_equal(after[1].token_ids, before[1].token_ids)
    assert mortal.backend.counters.scored == 0  # what was known stays known


def test_while_the_engine_is_down_everything_is_unavailable_at_once() -> None:
    with serving(theory(DEADLY), **LATER) as server:
        server.call(server.backend.vanish)
        wait_for(lambda: not ready(server))
        for make in WIRES.values():
            wire = make(server.grpc, server.http)
            for call in (wire.teacher, lambda w=wire: w.score(GOOD), lambda w=wire: w.generate(prompt(5, 6))):
                with pytest.raises(errors.Unavailable, match="died and is started again") as caught:
                    call()
                assert caught.value.retry_after_s
            wire.close()
        assert httpx.get(f"{server.http}/health").status_code == 200
        assert len(server.backends) == 1


def test_grpc_health_follows_an_idle_engines_death_and_return() -> None:
    seen: list[int] = []
    with serving(theory(DEADLY), restart={"backoff_s": 0.5}) as server, grpc.insecure_channel(server.grpc) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())

        def read() -> None:
            for answer in watch:
                seen.append(answer.status)
                if len(seen) == 3:
                    return

        reader = threading.Thread(target=read)
        reader.start()
        wait_for(lambda: seen)
        server.call(server.backend.vanish)
        reader.join(60)
        watch.cancel()
    assert seen == [STATUS.SERVING, STATUS.NOT_SERVING, STATUS.SERVING]


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_a_trainers_client_waits_for_the_restart(transport: str) -> None:
    waits: list[str] = []
    behaviours = iter([DEADLY, Behaviour()])  # the second engine answers what the first hung on
    with serving(lambda: theory(next(behaviours))(), **AT_ONCE) as server, ThreadPoolExecutor(1) as pool:
        address = server.grpc if transport == "grpc" else server.http
        with connect(address, patience_s=60, on_wait=waits.append) as client:
            client.score([Sequence([1, 2])])
            held = pool.submit(client.score, [Sequence([9, 8, 7]), Sequence([1, HANG])])
            wait_for(lambda: server.backend.counters.scored == 3)
            server.call(server.backend.vanish)
            assert [scores.positions for scores in held.result(60)] == [2, 1]
            client.generate([Prompt(token_ids=(3, 4))], Sampling(3))
    assert any("died and is started again" in line for line in waits)


def test_what_waited_for_its_turn_ends_with_the_engine_too() -> None:
    with serving(theory(DEADLY, batch_tokens=20), **AT_ONCE) as server, ThreadPoolExecutor(1) as pool:
        wire = GrpcWire(server.grpc, server.http)
        many = ScoreRequest(tuple(Sequence([HANG, *[i] * 19]) for i in range(40)))
        held = pool.submit(wire.score, many)
        wait_for(lambda: server.metric("teacher_queue_sequences") == 40)
        server.call(server.backend.vanish)
        assert isinstance(held.exception(), errors.Unavailable)
        wait_for(lambda: ready(server) and server.metric("teacher_queue_sequences") == 0)
        assert wire.score(GOOD)[0].positions == 3
        wire.close()


SCRIPT = """
import subprocess, sys
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.theoretical_backend import Behaviour, TheoreticalBackend
from teacher_server.run import run
from teacher_server.settings import load

made = []

def make():
    made.append(1)
    options = BackendOptions("theory", max_sequence_tokens=100)
    {second}
    return TheoreticalBackend(options, Behaviour(crashing_id=240))

sys.exit(run(load(sys.argv[1:], {{}})[0], make))
"""


def process(tmp_path: Path, second: str, *arguments: str) -> tuple[subprocess.Popen[str], dict[str, str]]:
    """A server in a process whose engine dies at id 240; `second` is what its making does beside."""
    file = tmp_path / "ready.json"
    line = [sys.executable, "-c", SCRIPT.format(second=second), "--model", "theory", "--grpc-port", "0"]
    line += ["--http-port", "0", "--ready-file", str(file), "--restart-backoff-s", "0", *arguments]
    with (tmp_path / "log").open("w") as log:
        running = subprocess.Popen(line, env=environment(), stderr=log, text=True, cwd=ROOT)
    wait_for(lambda: file.exists() or running.poll() is not None)
    assert file.exists(), (tmp_path / "log").read_text()
    return running, json.loads(file.read_text())


def kill_engine(addresses: dict[str, str]) -> None:
    """Has the engine die."""
    answer = httpx.post(f"{addresses['http']}/v1/score", json={"sequences": [[1, 240]]})
    assert answer.status_code == 503, answer.text


def test_a_server_that_gives_up_ends_with_code_1_and_one_line(tmp_path: Path) -> None:
    running, addresses = process(tmp_path, "pass", "--restart-attempts", "1")
    try:
        kill_engine(addresses)
        wait_for(lambda: httpx.get(f"{addresses['http']}/ready").status_code == 200)
        kill_engine(addresses)
        assert running.wait(60) == 1
    finally:
        running.kill()
        running.wait()
    log = (tmp_path / "log").read_text()
    (line,) = [line for line in log.splitlines() if "gives up" in line]
    assert line.endswith("the engine died, and was started again 1 times in 600 s")
    assert "Traceback" not in log


def test_weights_that_changed_under_a_running_server_end_it_with_both_fingerprints(tmp_path: Path) -> None:
    changed = "if len(made) > 1: return TheoreticalBackend(options, Behaviour(kappa=2.0))"
    running, addresses = process(tmp_path, changed)
    try:
        first = httpx.get(f"{addresses['http']}/v1/teacher").json()["fingerprint"]
        kill_engine(addresses)
        assert running.wait(60) == 1
    finally:
        running.kill()
        running.wait()
    (line,) = [line for line in (tmp_path / "log").read_text().splitlines() if "gives up" in line]
    assert f"the first had {first}" in line
    assert "has fingerprint " in line


def test_a_server_that_is_stopped_during_a_restart_leaves_at_once_and_no_process(tmp_path: Path) -> None:
    started = tmp_path / "started"
    second = f"if len(made) > 1: subprocess.run('echo $$ > {started}; exec sleep 3600', shell=True)"
    running, addresses = process(tmp_path, second)
    try:
        kill_engine(addresses)
        wait_for(lambda: "teacher_engine_restarts_total 1.0" in httpx.get(f"{addresses['http']}/metrics").text)
        child = int(wait_for(lambda: started.exists() and started.read_text()))
        assert psutil.pid_exists(child)
        running.terminate()
        assert running.wait(60) == 0
        wait_for(lambda: not psutil.pid_exists(child))
    finally:
        running.kill()
        running.wait()
    assert "Traceback" not in (tmp_path / "log").read_text()
