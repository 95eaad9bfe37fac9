"""Connections that send slowly, too much, nonsense or nothing: they end in time, with a reason, and stall nobody."""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
import pytest

from protos import codec
from protos.scores import ScoreRequest, ScoreSpec, Sequence
from protos.teacher.v1 import teacher_pb2 as pb
from protos.teacher.v1 import teacher_pb2_grpc
from tests.servers import Server, serving, theory, wait_for

HEAD = b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
LIMITS = {
    "head_s": 1.0,
    "body_s": 1.0,
    "body_kib_per_s": 64.0,
    "stall_s": 0.5,
    "head_kib": 8,
}


@pytest.fixture(scope="module")
def hurried() -> Iterator[Server]:
    """A server that waits for a second."""
    with serving(theory(), limits=LIMITS, max_request_mib=8) as server:
        yield server


def connect(server: Server, *, grpc_port: bool = False, receive_buffer: int = 0) -> socket.socket:
    """A raw connection to one of the ports."""
    place = urlsplit(f"//{server.grpc}" if grpc_port else server.http)
    one = socket.socket()
    if receive_buffer:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    one.settimeout(30)
    one.connect((place.hostname, place.port))
    return one


def read_all(one: socket.socket) -> bytes:
    """All until the other side ends the connection."""
    parts = []
    try:
        while part := one.recv(1 << 16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def refused(answer: bytes, status: int, reason: str) -> str:
    """The detail of a raw answer, which is a problem document of that status and reason, and the last one."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"connection: close" in head.lower()
    problem = json.loads(body)
    assert (problem["status"], problem["reason"]) == (status, reason)
    return str(problem["detail"])


def test_200_slow_connections_stall_nobody_and_end_in_time(hurried: Server) -> None:
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(hurried)) for _ in range(200)]
        for index, one in enumerate(slow):
            one.sendall([b"", b"GET /hea", HEAD + b"content-length: 9000\r\n\r\n{", HEAD][index % 4])
        with httpx.Client(base_url=hurried.http, timeout=30) as client:
            for i in range(20):
                client.post("/v1/score", json={"sequences": [[1, 2, i]]}).raise_for_status()
        answers = [read_all(one) for one in slow]
    for index, answer in enumerate(answers):
        if index % 4 == 2:
            detail = refused(answer, 408, "DEADLINE_EXCEEDED")
            assert re.match(r"\d bytes of the call came in 1 s, and not its end; this server waits 1 s", detail)
        else:
            assert "did not come in 1 s" in refused(answer, 408, "REQUEST_TIMEOUT")
    assert hurried.metric("teacher_refused_total", transport="http", reason="REQUEST_TIMEOUT") >= 150
    assert hurried.metric("teacher_in_flight", method="score") == 0
    wait_for(lambda: not hurried.app._http.server_state.connections)


def drip(one: socket.socket, piece: bytes, every: float, times: int, stop: threading.Event) -> None:
    """Sends a piece again and again."""
    for _ in range(times):
        if stop.wait(every):
            return
        try:
            one.sendall(piece)
        except OSError:
            return


def test_bytes_that_drip_do_not_keep_a_connection_alive(hurried: Server) -> None:
    stop = threading.Event()
    with connect(hurried) as head, connect(hurried) as body:
        body.sendall(HEAD + b"content-length: 9000\r\n\r\n")
        threads = [threading.Thread(target=drip, args=(one, b"x", 0.1, 300, stop)) for one in (head, body)]
        for thread in threads:
            thread.start()
        try:
            refused(read_all(head), 408, "REQUEST_TIMEOUT")
            refused(read_all(body), 408, "DEADLINE_EXCEEDED")
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def test_a_body_that_comes_at_the_rate_may_take_its_time(hurried: Server) -> None:
    piece = b" " * (24 << 10)  # every 0.2 s, so twice as fast as it must be

    def body() -> Iterator[bytes]:
        for _ in range(10):
            time.sleep(0.2)
            yield piece
        yield b'{"sequences": [[1, 2, 3]]}'

    response = httpx.post(f"{hurried.http}/v1/score", content=body(), timeout=30)
    assert response.status_code == 200, response.text


def test_a_body_that_nobody_wants_is_not_taken_for_ever(hurried: Server) -> None:
    with connect(hurried) as one:
        one.sendall(HEAD.replace(b"/v1/score", b"/v1/nothing") + b"content-length: 999999999999\r\n\r\n")
        sent = 0
        try:
            while True:
                sent += one.send(b"x" * (1 << 16))
                time.sleep(0.02)
        except OSError:  # it was ended, some seconds after the answer
            pass
        assert sent > 0


@pytest.mark.parametrize(
    ("sent", "status", "reason", "words"),
    [
        (b"GET / HTTP/1.1\r\nx: " + b"a" * 9000, 431, "REQUEST_HEADER_FIELDS_TOO_LARGE", "more than 8 KiB"),
        (b"\x16\x03\x01 nonsense\r\n\r\n", 400, "INVALID_REQUEST", "not HTTP/1.1"),
        (HEAD + b"content-length: -3\r\n\r\n", 400, "INVALID_REQUEST", "not HTTP/1.1"),
        (HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n", 400, "INVALID_REQUEST", "not HTTP/1.1"),
    ],
)
def test_what_is_no_http_is_a_problem_too(hurried: Server, sent: bytes, status: int, reason: str, words: str) -> None:
    with connect(hurried) as one:
        one.sendall(sent)
        assert words in refused(read_all(one), status, reason)


def test_a_websocket_is_not_opened(hurried: Server) -> None:
    with connect(hurried) as one:
        upgrade = "connection: upgrade, close\r\nupgrade: websocket\r\nsec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA=="
        one.sendall(f"GET /v1/teacher HTTP/1.1\r\nhost: x\r\n{upgrade}\r\nsec-websocket-version: 13\r\n\r\n".encode())
        assert read_all(one).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_reads_nothing_is_cut_off_and_holds_nothing(hurried: Server) -> None:
    body = protobuf(8192, 250)
    head = HEAD.replace(b"json", b"x-protobuf")
    with connect(hurried, receive_buffer=4096) as one:
        one.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        wait_for(lambda: hurried.metric("teacher_refused_total", transport="http", reason="STALLED") == 1)
    wait_for(lambda: hurried.metric("teacher_queue_tokens") == 0)
    assert hurried.metric("teacher_in_flight", method="score") == 0


def test_an_address_has_so_many_connections_and_no_more() -> None:
    with serving(theory(), limits={"connections_per_address": 10}) as server, ExitStack() as stack:
        held = [stack.enter_context(connect(server)) for _ in range(10)]
        wait_for(lambda: len(server.app._http.server_state.connections) == 10)
        with connect(server) as one:
            answer = read_all(one)
            assert refused(answer, 429, "OVERLOADED") == (
                "127.0.0.1 has 11 connections, 10 are taken; close some or retry later"
            )
            assert b"\r\nretry-after: 1\r\n" in answer
        for one in held:
            one.close()
        wait_for(lambda: len(server.app._http.server_state.connections) == 0)
        assert httpx.get(f"{server.http}/health").status_code == 200


def protobuf(tokens: int, top_k: int = 0) -> bytes:
    """A Score call of `tokens` tokens."""
    (message,) = codec.encode_score_request(ScoreRequest((Sequence([1] * tokens),), ScoreSpec(top_k)))
    return message.SerializeToString()


def test_bytes_that_are_being_received_are_bounded_over_both_transports() -> None:
    limits = {"reading_mib": 1, "body_s": 60.0}
    with serving(theory(), limits=limits) as server, grpc.insecure_channel(server.grpc) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        done = threading.Event()

        def slowly() -> Iterator[Any]:
            yield pb.ScoreRequest.FromString(protobuf(200_000))
            done.wait(30)

        call = stub.Score(slowly())
        wait_for(lambda: server.app._http._connections.reading.held > 700_000)
        headers = {"content-type": "application/x-protobuf"}
        response = httpx.post(f"{server.http}/v1/score", content=protobuf(200_000), headers=headers)
        assert response.status_code == 429
        assert re.search(r"\d+ bytes of calls are being received, this server holds 1048576", response.text)
        assert response.headers["retry-after"] == "1"
        assert httpx.post(f"{server.http}/v1/score", json={"sequences": ["ab"]}).status_code == 200
        call.cancel()
        done.set()
        wait_for(lambda: server.app._http._connections.reading.held == 0)
        assert httpx.post(f"{server.http}/v1/score", content=protobuf(30_000), headers=headers).status_code == 200


def test_json_has_limits_of_its_own_both_ways() -> None:
    limits = {"json_mib": 1, "json_numbers": 1000}
    with serving(theory(), limits=limits) as server, httpx.Client(base_url=server.http, timeout=30) as http:
        response = http.post("/v1/score", content=b" " * (1 << 20) + b"{", headers={"content-type": "application/json"})
        assert (response.status_code, response.json()["reason"]) == (413, "TOO_LARGE")
        assert "1048577 bytes, this server accepts 1048576" in response.text
        response = http.post("/v1/score", json={"sequences": [[1] * 100], "top_k": 5})
        assert (response.status_code, response.json()["reason"]) == (413, "TOO_LARGE")
        assert "the answer would have 1387 numbers, this server writes 1000 as JSON" in response.text
        assert http.post("/v1/score", json={"sequences": [[1] * 50], "top_k": 5}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/score", "/v1/generate", "/v1/completions", "/v1/chat/completions"])
def test_a_body_of_a_million_faults_is_refused_like_one_of_a_few(hurried: Server, path: str) -> None:
    many = {str(i): 0 for i in range(50_000)}
    for body in ({"sequences": ["x", [["a"] * 500_000]]}, many, {"chat_template_kwargs": many, "messages": [many]}):
        response = httpx.post(hurried.http + path, json=body, timeout=60)
        assert response.status_code == 422
        assert len(response.text) < 3000


def test_a_grpc_call_whose_messages_do_not_come_ends_in_time(hurried: Server) -> None:
    done = threading.Event()

    def one_then_none() -> Iterator[Any]:
        yield pb.ScoreRequest()
        done.wait(30)

    with grpc.insecure_channel(hurried.grpc) as channel, pytest.raises(grpc.RpcError) as caught:
        list(teacher_pb2_grpc.TeacherServiceStub(channel).Score(one_then_none()))
    done.set()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED  # type: ignore[attr-defined]
    assert "and not its end; this server waits 1 s" in caught.value.details()  # type: ignore[attr-defined]


def frame(kind: int, flags: int, payload: bytes) -> bytes:
    """An HTTP/2 frame of the connection (RFC 9113, section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", 0) + payload


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, b"")
GOAWAY, PING = 7, 6


def test_a_grpc_connection_that_only_pings_is_told_to_go_away(hurried: Server) -> None:
    with connect(hurried, grpc_port=True) as one:
        one.sendall(PREFACE)
        try:
            for _ in range(50):
                one.sendall(frame(PING, 0, b"12345678"))
                time.sleep(0.01)
        except OSError:
            pass
        assert b"too_many_pings" in read_all(one)


@pytest.mark.parametrize("sent", [b"", b"PRI * HTTP/2.0", b"GET / HTTP/1.1\r\n\r\n", PREFACE[:30]])
def test_a_grpc_connection_without_a_handshake_ends_in_time(hurried: Server, sent: bytes) -> None:
    with connect(hurried, grpc_port=True) as one:
        one.sendall(sent)
        read_all(one)


def test_grpc_has_so_many_connections_and_no_more() -> None:
    with serving(theory(), limits={"connections": 3}) as server, ExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]

        def call(channel: grpc.Channel) -> str:
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            return str(stub.GetTeacher(pb.GetTeacherRequest(), timeout=2).name)

        held = [stack.enter_context(grpc.insecure_channel(server.grpc, options=options)) for _ in range(4)]
        assert [call(channel) for channel in held[:3]] == ["theory"] * 3
        with pytest.raises(grpc.RpcError):
            call(held[3])
        held[0].close()
        wait_for(lambda: succeeds(lambda: call(held[3])))


def succeeds(call: Callable[[], Any]) -> bool:
    """Whether a call ends without an error of gRPC."""
    try:
        call()
    except grpc.RpcError:
        return False
    return True


def test_metadata_that_is_too_long_and_a_message_that_is_too_large_are_refused(hurried: Server) -> None:
    with serving(theory(), max_message_mib=1) as server, grpc.insecure_channel(server.grpc) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        metadata = (("x-client", "a" * 100_000),)
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetTeacher(pb.GetTeacherRequest(), metadata=metadata, timeout=10)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Score(iter([pb.ScoreRequest.FromString(protobuf(300_000))]), timeout=10))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]
        assert "1048576" in caught.value.details()  # type: ignore[attr-defined]
