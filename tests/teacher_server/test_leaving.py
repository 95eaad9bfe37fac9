"""Who leaves, and what is left then: clients that go in the middle of work, and servers that are told to stop."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from protos import codec, errors
from protos.scores import GenerateRequest, Prompt, Sampling, ScoreRequest, Scores, ScoreSpec, Sequence
from protos.teacher.v1 import teacher_pb2_grpc
from teacher_server.backends.factory import make_backend
from teacher_server.backends.options import BackendOptions
from tests.contract.wires import WIRES, GrpcWire, HttpWire, Wire
from tests.servers import Server, process, serving, wait_for
from tests.tiny_qwen3 import make

pytestmark = pytest.mark.slow
LONG = 2000
PROTOBUF = {"content-type": "application/x-protobuf"}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The transformers backend on a tiny Qwen3, without a cache."""
    folder = make(Path(tmp_path_factory.mktemp("qwen3")))
    options = BackendOptions(model=str(folder), dtype="float32", device="cpu", batch_tokens=4096)
    with serving(lambda: make_backend(options), cache={"enabled": False}) as server:
        yield server


def generation(stream: bool) -> GenerateRequest:
    """Two long completions."""
    prompts = (Prompt(token_ids=[5, 6, 7]), Prompt(token_ids=[8, 9]))
    return GenerateRequest(prompts, Sampling(LONG, ignore_eos=True), stream=stream)


def scoring() -> ScoreRequest:
    """Many sequences: a few are in the engine, the others wait for their turn."""
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, 200, 1000).astype(np.int32) for _ in range(200)]
    return ScoreRequest(tuple(map(Sequence, ids)), ScoreSpec(8))


def still(server: Server) -> bool:
    """Whether all gauges of work are 0."""
    gauges = ["teacher_queue_tokens", "teacher_queue_sequences"]
    found = [server.metric(name) for name in gauges]
    found += [server.metric("teacher_in_flight", method=method) for method in ("score", "generate", "head")]
    found += [server.metric("teacher_submitted_tokens", lane=lane) for lane in ("score", "generate")]
    return not any(found)


def leave_grpc(server: Server, request: Any, busy: Callable[[], bool]) -> None:
    """Cancels a call once the engine is at work on it."""
    with grpc.insecure_channel(server.grpc) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        if isinstance(request, ScoreRequest):
            call = stub.Score(codec.encode_score_request(request, codec.CHUNK_BYTES))
        else:
            call = stub.Generate(codec.encode_generate_request(request))
        wait_for(busy)
        call.cancel()


def leave_by_deadline(server: Server, request: Any, busy: Callable[[], bool]) -> None:
    """Lets a call's deadline pass while the engine is at work on it."""
    with grpc.insecure_channel(server.grpc) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        if isinstance(request, ScoreRequest):
            call = stub.Score(codec.encode_score_request(request, codec.CHUNK_BYTES), timeout=0.5)
        else:
            call = stub.Generate(codec.encode_generate_request(request), timeout=0.5)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]


def leave_http(server: Server, request: Any, busy: Callable[[], bool]) -> None:
    """Closes the connection of a call once the engine is at work on it."""
    if isinstance(request, ScoreRequest):
        path, (message,) = "/v1/score", codec.encode_score_request(request)
    else:
        path, message = "/v1/generate", codec.encode_generate_request(request)
    with httpx.Client(base_url=server.http, timeout=60) as client:

        def call() -> None:
            try:
                with client.stream("POST", path, content=message.SerializeToString(), headers=PROTOBUF) as response:
                    for _ in response.iter_bytes():
                        pass
            except (httpx.HTTPError, RuntimeError):  # the connection is closed under it
                pass

        thread = threading.Thread(target=call)
        thread.start()
        wait_for(busy)
        for pooled in client._transport._pool.connections:  # type: ignore[attr-defined]
            pooled._connection._network_stream.get_extra_info("socket").shutdown(2)
    thread.join()


@pytest.mark.parametrize("leave", [leave_grpc, leave_http, leave_by_deadline])
@pytest.mark.parametrize("what", ["streamed", "whole", "scores"])
def test_who_leaves_stops_the_engine_at_its_next_step_and_holds_nothing(
    real: Server, leave: Callable[..., None], what: str
) -> None:
    request = scoring() if what == "scores" else generation(what == "streamed")
    before = real.backend.steps

    def busy() -> bool:
        return bool(real.backend.steps > before + 1)

    leave(real, request, busy)
    wait_for(lambda: real.metric("teacher_in_flight", method="score" if what == "scores" else "generate") == 0)
    # What was submitted when the call ended may be one step; what else would follow is hundreds.
    ended = real.backend.steps
    wait_for(lambda: still(real))
    time.sleep(0.2)
    assert real.backend.steps <= ended + 2
    assert real.backend.steps - before < (50 if what == "scores" else LONG)
    assert real.metric("teacher_hidden_bytes") == 0


def result_of(call: Callable[[], list[Scores]]) -> str:
    """OK, or the reason."""
    try:
        assert all(one.positions for one in call())
    except errors.TeacherError as error:
        return error.reason
    return "OK"


def test_sigterm_loses_no_accepted_call_and_turns_health_first(tmp_path: Path) -> None:
    """A server with 2 s of work accepted over both transports, told to stop in the middle of it."""
    code = (
        "import sys; from teacher_server.run import run; from teacher_server.config import ServerConfig\n"
        "from teacher_server.backends.theoretical_backend import Behaviour, TheoreticalBackend\n"
        "from teacher_server.backends.options import BackendOptions\n"
        "options = BackendOptions(model='theory', batch_tokens=100)\n"
        "config = ServerConfig(model='theory', grpc_port=0, http_port=0, ready_file=sys.argv[1],\n"
        "    cache={'enabled': False})\n"
        "sys.exit(run(config, lambda: TheoreticalBackend(options, Behaviour(tokens_per_second=1500))))\n"
    )
    with process(tmp_path, code=code) as (server, addresses), ThreadPoolExecutor(12) as pool:
        wires: list[Wire] = [kind(addresses["grpc"], addresses["http"]) for kind in WIRES.values() for _ in range(4)]
        request = ScoreRequest(tuple(Sequence(np.full(20, i)) for i in range(12)), ScoreSpec(2))
        metrics = f"{addresses['http']}/metrics"
        calls: list[Future[str]] = [pool.submit(result_of, lambda wire=wire: wire.score(request)) for wire in wires]
        wait_for(lambda: 'teacher_in_flight{method="score"} 12.0' in httpx.get(metrics).text)
        with grpc.insecure_channel(addresses["grpc"]) as channel:
            watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            server.send_signal(signal.SIGTERM)
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            ready = httpx.get(f"{addresses['http']}/ready")
            assert (ready.status_code, ready.json()["reason"]) == (503, "UNAVAILABLE")
            assert httpx.get(f"{addresses['http']}/health").status_code == 200
            late = [kind(addresses["grpc"], addresses["http"]) for kind in (GrpcWire, HttpWire)]
            for wire in late:
                with pytest.raises(errors.Unavailable, match="shutting down; retry later") as caught:
                    wire.score(request)
                assert caught.value.retry_after_s
            assert not all(call.done() for call in calls)
            assert [call.result() for call in calls] == ["OK"] * 12
            assert list(watch) == []
        for wire in (*wires, *late):
            wire.close()
        assert server.wait(20) == 0
    assert "giving up" not in (tmp_path / "log").read_text()


def test_a_second_sigterm_does_not_wait(tmp_path: Path) -> None:
    code = (
        "import sys; from teacher_server.run import run; from teacher_server.config import ServerConfig\n"
        "from teacher_server.backends.theoretical_backend import Behaviour, TheoreticalBackend\n"
        "from teacher_server.backends.options import BackendOptions\n"
        "config = ServerConfig(model='theory', grpc_port=0, http_port=0, ready_file=sys.argv[1])\n"
        "make = lambda: TheoreticalBackend(BackendOptions(model='theory'), Behaviour(hanging_id=9))\n"
        "sys.exit(run(config, make))\n"
    )
    with process(tmp_path, code=code) as (server, addresses), ThreadPoolExecutor(1) as pool:
        wire = GrpcWire(addresses["grpc"], addresses["http"])
        call = pool.submit(result_of, lambda: wire.score(ScoreRequest((Sequence([1, 9]),))))
        wait_for(lambda: 'in_flight{method="score"} 1.0' in httpx.get(f"{addresses['http']}/metrics").text)
        server.send_signal(signal.SIGTERM)
        wait_for(lambda: "draining 1 calls" in (tmp_path / "log").read_text())
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
        assert call.result() == "UNAVAILABLE"
        wire.close()


def test_a_large_answer_that_is_read_slowly_is_still_given_after_sigterm(tmp_path: Path) -> None:
    options = ("--backend", "theoretical", "--model", "theory")
    with process(tmp_path, *options) as (server, addresses):
        body = {"sequences": [list(range(200)) * 5], "top_k": 200}
        with httpx.stream("POST", f"{addresses['http']}/v1/score", json=body, timeout=60) as response:
            parts = response.iter_bytes(1 << 16)
            data = next(parts)
            server.send_signal(signal.SIGTERM)
            wait_for(lambda: "draining" in (tmp_path / "log").read_text())
            for part in parts:
                data += part
                time.sleep(0.05)
        assert len(json.loads(data)["sequences"][0]["top_logprobs"]) == 999
        assert server.wait(20) == 0
