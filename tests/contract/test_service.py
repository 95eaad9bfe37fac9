"""What clients see of the service as a whole: isolation, cancellation, order, sharing, health and reflection."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from protos import codec, errors
from protos.scores import GenerateRequest, Prompt, Sampling, ScoreRequest, ScoreSpec, Sequence
from protos.teacher.v1 import teacher_pb2_grpc
from teacher_server.backends.theoretical_backend import Behaviour
from tests.contract.wires import WIRES, GrpcWire, HttpWire, Wire
from tests.servers import Server, serving, theory, wait_for

HANGING = 251
SERVICE = "teacher.v1.TeacherService"


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    """A server with a cache whose engine hangs on request."""
    with serving(theory(Behaviour(hanging_id=HANGING))) as server:
        yield server


def quiet(server: Server) -> bool:
    """Whether nothing is in progress."""
    names = ("teacher_queue_tokens", "teacher_queue_sequences", "teacher_in_flight", "teacher_submitted_tokens")
    lanes: list[dict[str, str]] = [{}, {}, *({"method": m} for m in ("score", "generate"))]
    values = [server.metric(name) for name in names[:2]]
    values += [server.metric(names[2], **labels) for labels in lanes[2:]]
    values += [server.metric(names[3], lane=lane) for lane in ("score", "generate")]
    return values == [0.0] * 6


def test_the_description_is_the_backends(wire: Wire, server: Server) -> None:
    assert wire.teacher() == server.app.service.teacher()


def test_a_bad_sequence_among_good_ones_hurts_no_other_client(shared_server: Server) -> None:
    good = [Wire(shared_server.grpc, shared_server.http, client=f"good-{i}") for i, Wire in enumerate(WIRES.values())]
    bad = GrpcWire(shared_server.grpc, shared_server.http, client="bad")
    broken = ScoreRequest((Sequence([1, 2, 3]), Sequence([4, 999]), Sequence([5, 6])))

    def score(wire: Wire, seed: int) -> bool:
        request = ScoreRequest(tuple(Sequence(np.random.default_rng(seed + i).integers(0, 200, 20)) for i in range(4)))
        return all(s.positions == 19 for s in wire.score(request))

    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(score, wire, 10 * round_ + i) for round_ in range(5) for i, wire in enumerate(good)]
        for _ in range(10):
            with pytest.raises(errors.InvalidSequence) as caught:
                bad.score(broken)
            assert caught.value.index == 1
        assert all(result.result() for result in results)
    for wire in (*good, bad):
        wire.close()


def test_a_grpc_client_that_cancels_frees_everything(shared_server: Server) -> None:
    channel = grpc.insecure_channel(shared_server.grpc)
    stub = teacher_pb2_grpc.TeacherServiceStub(channel)
    cancelled = shared_server.backend.counters.cancelled
    request = ScoreRequest((Sequence([1, 2]), Sequence([1, HANGING, 3])))
    call = stub.Score(codec.encode_score_request(request))
    next(call)
    wait_for(lambda: shared_server.metric("teacher_queue_tokens") == 3)
    call.cancel()
    wait_for(lambda: quiet(shared_server))
    prompt = GenerateRequest((Prompt(token_ids=[HANGING]),), Sampling(5))
    generation = stub.Generate(codec.encode_generate_request(prompt))
    wait_for(lambda: shared_server.metric("teacher_queue_tokens") == 6)
    generation.cancel()
    wait_for(lambda: quiet(shared_server))
    assert shared_server.backend.counters.cancelled == cancelled + 2
    channel.close()


@pytest.mark.parametrize("began", [False, True], ids=["before the first row", "after the first row"])
@pytest.mark.parametrize("kind", ["protobuf", "json"])
def test_an_http_client_that_leaves_frees_everything(shared_server: Server, kind: str, began: bool) -> None:
    cancelled = shared_server.backend.counters.cancelled
    ids = [[1, 2], [1, HANGING, 3]] if began else [[1, HANGING, 3]]
    if kind == "json":
        options: dict[str, Any] = {"json": {"sequences": ids}}
    else:
        (message,) = codec.encode_score_request(ScoreRequest(tuple(Sequence(i) for i in ids)))
        options = {
            "content": message.SerializeToString(),
            "headers": {"content-type": "application/x-protobuf"},
        }
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{shared_server.http}/v1/score", timeout=0.3, **options)
    wait_for(lambda: quiet(shared_server))
    assert shared_server.backend.counters.cancelled == cancelled + 1


def test_a_streamed_generation_ends_when_its_reader_leaves() -> None:
    with serving(theory(Behaviour(tokens_per_second=100))) as server:
        body = {"prompts": ["x"], "sampling": {"max_tokens": 10_000, "ignore_eos": True}, "stream": True}
        with httpx.stream("POST", f"{server.http}/v1/generate", json=body) as response:
            next(response.iter_bytes())
        wait_for(lambda: quiet(server))
        assert server.backend.counters.new_tokens < 100
        assert server.metric("teacher_requests_total", outcome="CANCELLED", method="generate") == 1


def test_equal_requests_in_flight_are_computed_once_and_then_known() -> None:
    with serving(theory(Behaviour(latency_s=0.3))) as server:
        wires = [make(server.grpc, server.http, client=name) for name, make in WIRES.items()]
        request = ScoreRequest((Sequence([1, 2, 3]), Sequence([1, 2, 3])), ScoreSpec(2))
        with ThreadPoolExecutor(3) as pool:
            results = list(pool.map(lambda wire: wire.score(request), wires))
        assert server.backend.counters.scored == 1
        assert server.metric("teacher_joined_tokens_total") + server.metric("teacher_cached_tokens_total") == 15
        for scores in (one for pair in results for one in pair):
            np.testing.assert_allclose(scores.token_logprobs, results[0][0].token_logprobs)
        wires[0].score(request)
        assert server.backend.counters.scored == 1
        wires[0].score(ScoreRequest((Sequence([1, 2, 3], 2),), ScoreSpec(2)))
        assert server.backend.counters.scored == 2
        for wire in wires:
            wire.close()


def test_one_who_leaves_does_not_cancel_the_others() -> None:
    with serving(theory(Behaviour(latency_s=0.6))) as server:
        (message,) = codec.encode_score_request(ScoreRequest((Sequence([1, 2, 3]),)))
        stub = teacher_pb2_grpc.TeacherServiceStub(grpc.insecure_channel(server.grpc))
        leaver = stub.Score(iter([message]))
        wait_for(lambda: server.backend.counters.scored == 1)
        stayer = stub.Score(iter([message]))
        wait_for(lambda: server.metric("teacher_joined_tokens_total") == 3)
        leaver.cancel()
        assert [m.total_rows for m in stayer] == [2]
        assert server.backend.counters.cancelled == 0
        assert server.backend.counters.scored == 1


def test_clients_are_served_in_turn_whoever_asked_for_most() -> None:
    """One client asks for 60 sequences, then another for 3: the second does not wait for the first's end."""
    with serving(theory(Behaviour(tokens_per_second=2000), batch_tokens=20), cache={"enabled": False}) as server:
        greedy = GrpcWire(server.grpc, server.http, client="greedy")
        modest = HttpWire(server.grpc, server.http, client="modest")
        many = ScoreRequest(tuple(Sequence(np.full(20, i % 250)) for i in range(60)))
        thread = threading.Thread(target=greedy.score, args=(many,))
        thread.start()
        wait_for(lambda: server.backend.counters.scored >= 2)
        modest.score(ScoreRequest(tuple(Sequence(np.full(21, i)) for i in range(3))))
        thread.join()
        order = server.backend.counters.score_order
        assert max(i for i, n in enumerate(order) if n == 21) < 40, order
        greedy.close()
        modest.close()


def test_the_engine_holds_two_batches_and_no_more() -> None:
    with serving(theory(Behaviour(tokens_per_second=250), batch_tokens=30), cache={"enabled": False}) as server:
        wire = GrpcWire(server.grpc, server.http)
        many = ScoreRequest(tuple(Sequence(np.full(20, i)) for i in range(20)))
        thread = threading.Thread(target=wire.score, args=(many,))
        thread.start()
        wait_for(lambda: server.metric("teacher_submitted_tokens", lane="score") == 60)
        seen = []
        while thread.is_alive():
            seen.append(server.metric("teacher_submitted_tokens", lane="score"))
        assert max(seen) <= 60
        thread.join()
        wire.close()


def short_prompts(count: int, max_tokens: int = 12, **sampling: Any) -> GenerateRequest:
    """Prompts of 8 tokens."""
    prompts = tuple(Prompt(token_ids=(*range(1, 8), i % 200)) for i in range(count))
    return GenerateRequest(prompts, Sampling(max_tokens, ignore_eos=True, **sampling))


def test_generation_has_the_room_that_its_engine_has_and_a_quarter_more() -> None:
    """Room for 160 tokens; a prompt and its completion take 20."""
    with serving(theory(Behaviour(tokens_per_second=400), batch_tokens=40)) as server:
        wire = GrpcWire(server.grpc, server.http)
        thread = threading.Thread(target=wire.generate, args=(short_prompts(30),))
        thread.start()
        wait_for(lambda: server.metric("teacher_submitted_tokens", lane="generate") == 200)
        seen = []
        while thread.is_alive():
            seen.append(server.metric("teacher_submitted_tokens", lane="generate"))
        assert max(seen) <= 200
        thread.join()
        wire.close()


def test_completions_that_end_early_let_more_prompts_in() -> None:
    with serving(theory(Behaviour(hanging_id=HANGING), batch_tokens=40)) as server, ThreadPoolExecutor(2) as pool:
        wire = GrpcWire(server.grpc, server.http, timeout=2)
        hanging = GenerateRequest((Prompt(token_ids=(HANGING,)),) * 64, Sampling(39))
        held = pool.submit(wire.generate, hanging)
        wait_for(lambda: server.metric("teacher_submitted_tokens", lane="generate") == 200)
        assert server.backend.counters.generated == 5
        assert isinstance(held.exception(), errors.DeadlineExceeded)
        wire.generate(short_prompts(128, 100, stop_token_ids=tuple(range(261))))
        begun = server.backend.counters.generated
        held = pool.submit(wire.generate, hanging)
        wait_for(lambda: server.metric("teacher_submitted_tokens", lane="generate") > 190)
        assert server.backend.counters.generated - begun > 30
        assert isinstance(held.exception(), errors.DeadlineExceeded)
        wire.close()


def test_one_clients_many_prompts_do_not_keep_another_waiting() -> None:
    with serving(theory(Behaviour(tokens_per_second=4000), batch_tokens=40)) as server, ThreadPoolExecutor(1) as pool:
        greedy = GrpcWire(server.grpc, server.http, client="greedy")
        modest = HttpWire(server.grpc, server.http, client="modest")
        held = pool.submit(greedy.generate, short_prompts(400))
        wait_for(lambda: server.backend.counters.generated >= 10)
        modest.generate(short_prompts(1))
        assert server.backend.counters.generated < 100
        assert not held.done()
        held.result()
        greedy.close()
        modest.close()


def test_health_follows_readiness_for_each_service() -> None:
    loaded = threading.Event()

    def make_backend() -> Any:
        loaded.wait(30)
        return theory()()

    with serving(make_backend, wait_ready=False) as server, grpc.insecure_channel(server.grpc) as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        def status(name: str) -> int:
            return int(stub.Check(health_pb2.HealthCheckRequest(service=name)).status)

        status_type = health_pb2.HealthCheckResponse
        assert {status(name) for name in ("", SERVICE)} == {status_type.NOT_SERVING}
        assert httpx.get(f"{server.http}/health").status_code == 200
        ready = httpx.get(f"{server.http}/ready")
        assert (ready.status_code, ready.json()["detail"]) == (503, "the teacher is loading; retry later")
        loaded.set()
        wait_for(lambda: status(SERVICE) == status_type.SERVING)
        assert status("") == status_type.SERVING
        assert httpx.get(f"{server.http}/ready").status_code == 200
        with pytest.raises(grpc.RpcError) as caught:
            status("nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]


def test_a_crashed_engine_is_not_ready() -> None:
    with serving(theory(Behaviour(crashing_id=7))) as server:
        wire = GrpcWire(server.grpc, server.http)
        with pytest.raises(errors.Unavailable):
            wire.score(ScoreRequest((Sequence([1, 7]),)))
        ready = httpx.get(f"{server.http}/ready")
        assert (ready.status_code, ready.json()["detail"]) == (503, "the engine does not answer; retry later")
        assert httpx.get(f"{server.http}/health").status_code == 200
        wire.close()


def test_reflection_lists_the_services(shared_server: Server) -> None:
    with grpc.insecure_channel(shared_server.grpc) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = stub.ServerReflectionInfo(iter([request]))
        names = {service.name for service in answer.list_services_response.service}
        assert {SERVICE, "grpc.health.v1.Health"} <= names
        request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)
        (answer,) = stub.ServerReflectionInfo(iter([request]))
        assert answer.file_descriptor_response.file_descriptor_proto


def test_calls_in_progress_end_before_a_server_does() -> None:
    with serving(theory(Behaviour(latency_s=0.5)), grace_s=20.0) as server, ThreadPoolExecutor(3) as pool:
        wires = [make(server.grpc, server.http) for make in WIRES.values()]
        results = [pool.submit(wire.score, ScoreRequest((Sequence([1, 2, 3 + i]),))) for i, wire in enumerate(wires)]
        wait_for(lambda: server.backend.counters.scored == 3)
        server.call(server.app.stop)
        assert [result.result()[0].positions for result in results] == [2, 2, 2]
        for wire in wires:
            wire.close()


def test_what_outlives_the_grace_period_is_unavailable() -> None:
    with serving(theory(Behaviour(hanging_id=HANGING)), grace_s=0.2) as server, ThreadPoolExecutor(3) as pool:
        wires = [make(server.grpc, server.http) for make in WIRES.values()]
        results = [pool.submit(wire.score, ScoreRequest((Sequence([1, HANGING, 3]),))) for wire in wires]
        wait_for(lambda: server.metric("teacher_in_flight", method="score") == 3)
        server.call(server.app.stop)
        for result in results:
            error = result.exception()
            assert isinstance(error, errors.Unavailable), error
            assert "shut down with 1 of 1 sequences unanswered" in error.message
        for wire in wires:
            wire.close()
