"""Several servers of one teacher, listed or behind one name: spread, failover, return, refusal of another teacher."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import pytest

from protos import errors
from protos.scores import ScoreSpec, Sequence
from student_trainer.teacher_client import connect, names, replicas, watch
from student_trainer.teacher_client.names import Name
from tests.servers import serving, theory, wait_for
from tests.student_trainer.live import OVER, ScriptedTeacher, over_grpc, over_http, teacher_info


def sequences(*sizes: int) -> list[Sequence]:
    return [Sequence(np.arange(1, size + 1)) for size in sizes]


def scored(client: Any, *sizes: int) -> list[list[float]]:
    return [s.token_logprobs.tolist() for s in client.score(sequences(*sizes))]


def right(*sizes: int) -> list[list[float]]:
    return [[-float(i) for i in range(2, size + 1)] for size in sizes]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_replicas_share_the_work() -> None:
    one, two = ScriptedTeacher(slow_s=0.05), ScriptedTeacher(slow_s=0.05)
    with over_grpc(one) as a, over_http(two) as b, connect([a, b], max_in_flight=4) as client:
        sizes = [20] * 12
        assert scored(client, *sizes) == right(*sizes)
        for _ in range(4):
            client.submit_score(sequences(*sizes), ScoreSpec()).result()
    assert sum(one.sequences) > 10
    assert sum(two.sequences) > 10


def test_the_one_with_fewest_tokens_outstanding_gets_the_next_call() -> None:
    """A slow server holds one long call; all short ones go to the other meanwhile."""
    slow, quick = ScriptedTeacher(), ScriptedTeacher()
    with over_grpc(slow) as a, over_grpc(quick) as b, connect([a, b], max_in_flight=8) as client:
        slow.slow_s = quick.slow_s = 1.5
        client.submit_score(sequences(90))
        held = wait_for(lambda: next((t for t in (slow, quick) if t.running), None))
        other = quick if held is slow else slow
        other.slow_s = 0.0
        for _ in range(6):
            scored(client, 5)
        assert len(held.sequences) <= 1
        assert len(other.sequences) == 6


def test_a_dead_replica_is_left_out_and_the_others_go_on() -> None:
    two = ScriptedTeacher()
    dead = f"127.0.0.1:{free_port()}"
    with over_grpc(two) as b, connect([dead, b], patience_s=10) as client:
        for _ in range(5):
            assert scored(client, 4, 5) == right(4, 5)


def test_a_replica_that_dies_on_the_way_is_replaced() -> None:
    one, two = ScriptedTeacher(), ScriptedTeacher()
    with over_grpc(two) as b:
        with over_grpc(one) as a:
            client = connect([a, b], patience_s=10)
            assert scored(client, 4) == right(4)
        with client:
            assert [scored(client, size) for size in range(2, 8)] == [right(size) for size in range(2, 8)]
    assert one.calls + two.calls >= 8


def test_a_replica_returns_when_it_is_back_and_has_said_who_it_is() -> None:
    one, two, again = ScriptedTeacher(), ScriptedTeacher(), ScriptedTeacher()
    with over_grpc(two) as b:
        with over_grpc(one) as a:
            client = connect([a, b], patience_s=10)
        with client:
            for _ in range(4):
                scored(client, 4)
            with over_grpc(again, int(a.rpartition(":")[2])):
                wait_for(lambda: scored(client, 4) and again.sequences)
                assert again.calls > len(again.sequences), "it was asked before it got a call"
                client.close()


@pytest.mark.parametrize("kind", list(OVER))
def test_a_real_server_that_starts_again_gets_calls_again(kind: str) -> None:
    ports = {"grpc_port": free_port(), "http_port": free_port(), "cache": {"enabled": False}}
    with serving(theory()) as other:
        with serving(theory(), **ports) as server:
            client = connect([getattr(server, kind), getattr(other, kind)], patience_s=20)
        with client:
            for _ in range(4):
                client.score(sequences(20, 30))
            with serving(theory(), **ports) as server:
                wait_for(lambda: client.score(sequences(20, 30)) and server.backend.counters.scored)
                client.close()


def test_a_replica_that_starts_late_is_taken_in() -> None:
    port, late = free_port(), ScriptedTeacher()
    with over_grpc(ScriptedTeacher()) as a, connect([f"127.0.0.1:{port}", a], patience_s=10) as client:
        scored(client, 4)
        with over_grpc(late, port):
            wait_for(lambda: scored(client, 4) and late.sequences)
            client.close()


def test_replicas_of_another_teacher_are_refused_at_the_start() -> None:
    one, two = ScriptedTeacher(), ScriptedTeacher(info=teacher_info(fingerprint="f2"))
    with (
        over_grpc(one) as a,
        over_http(two) as b,
        pytest.raises(errors.TeacherMismatch, match=f"{a} is scripted with f1; {b} is scripted with f2"),
    ):
        connect([a, b])


def test_one_that_becomes_another_teacher_is_left_out_until_it_is_the_right_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replicas, "REFUSED_S", 0.5)
    caplog.set_level(logging.ERROR)
    one, two = ScriptedTeacher(), ScriptedTeacher()
    with over_grpc(one) as a, over_http(two) as b, connect([a, b], max_in_flight=4) as client:
        two.info = teacher_info(fingerprint="f2")
        for _ in range(4):
            assert scored(client, 50, 50, 50, 50) == right(50, 50, 50, 50)
        assert f"{b} is left out" in caplog.text
        assert caplog.text.count("is left out") == 1
        two.info = teacher_info()
        before = len(two.sequences)
        wait_for(lambda: scored(client, 50, 50, 50, 50) and len(two.sequences) > before + 2)


def test_where_all_are_another_teacher_the_call_fails() -> None:
    one, two = ScriptedTeacher(), ScriptedTeacher()
    with over_grpc(one) as a, over_grpc(two) as b, connect([a, b]) as client:
        one.info = two.info = teacher_info(fingerprint="f2")
        with pytest.raises(errors.TeacherMismatch, match="this is f2, not f1"):
            scored(client, 4)


@contextmanager
def at(kind: str, hosts: list[str], teachers: list[ScriptedTeacher], port: int) -> Iterator[ExitStack]:
    """Servers of one port at several of this machine's own addresses."""
    with ExitStack() as running:
        for host, teacher in zip(hosts, teachers, strict=True):
            running.enter_context(OVER[kind](teacher, port, host))
        yield running


@pytest.mark.parametrize("kind", list(OVER))
def test_each_address_of_a_name_is_a_replica_and_is_told_the_name(kind: str) -> None:
    port, hosts = free_port(), ["127.0.0.1", "127.0.0.2", "127.0.0.3"]
    teachers = [ScriptedTeacher(slow_s=0.02) for _ in hosts]
    address = f"dns://teachers.test:{port}" if kind == "grpc" else f"dns+http://teachers.test:{port}"
    with at(kind, hosts, teachers, port), connect(address, resolve=lambda host, port: hosts) as client:
        for _ in range(4):
            assert scored(client, *[20] * 9) == right(*[20] * 9)
    assert all(len(teacher.sequences) > 1 for teacher in teachers)
    if kind == "http":
        assert {name for teacher in teachers for name in teacher.hosts} == {f"teachers.test:{port}"}


def test_a_name_is_looked_up_again(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(watch, "LOOK_UP_S", 0.2)
    port, asked = free_port(), []
    hosts = ["127.0.0.1"]

    def resolve(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return list(hosts)

    teachers = [ScriptedTeacher() for _ in range(3)]
    with at("grpc", ["127.0.0.1", "127.0.0.2", "127.0.0.3"], teachers, port):
        teachers[2].info = teacher_info(fingerprint="f2")
        with connect(f"dns://teachers.test:{port}", resolve=resolve) as client:
            scored(client, 4)
            hosts[:] = ["127.0.0.2", "127.0.0.3"]
            wait_for(lambda: scored(client, 4) and teachers[1].sequences)
            wait_for(lambda: "127.0.0.3:" in caplog.text)
            before = len(teachers[0].sequences)
            scored(client, 4)
            assert len(teachers[0].sequences) == before
            assert not teachers[2].sequences
            hosts.clear()
            scored(client, 4)
    assert set(asked) == {("teachers.test", port)}


def test_a_name_that_has_no_address_yet_is_waited_for() -> None:
    port, known = free_port(), threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        if not known.is_set():
            raise socket.gaierror("not known yet")
        return ["127.0.0.1"]

    with over_grpc(ScriptedTeacher(), port):
        with pytest.raises(errors.Unavailable, match=r"no server is known at dns://teachers\.test"):
            connect(f"dns://teachers.test:{port}", patience_s=0.3, resolve=resolve)
        lines: list[str] = []
        with connect(
            f"dns://teachers.test:{port}",
            patience_s=20,
            resolve=resolve,
            on_wait=lambda line: (lines.append(line), known.set())[0],
        ) as client:
            assert scored(client, 4) == right(4)
        assert lines


def test_this_machines_resolver_gives_addresses() -> None:
    assert "127.0.0.1" in names.resolve("localhost", 1)
    with pytest.raises(OSError, match=r"\w"):
        names.resolve("no-such-name.invalid", 1)


@pytest.mark.parametrize("address", ["dns://", "dns://teachers", "dns+ftp://t:1", "dns://10.0.0.1:1", "dns://t:x"])
def test_what_is_no_name_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="teacher"):
        Name(address)


def test_real_servers_share_a_clients_work_and_one_of_them_may_die() -> None:
    with serving(theory()) as one, serving(theory()) as two:
        with connect([one.grpc, two.http], max_in_flight=4, patience_s=20) as client:
            batches = [[Sequence(np.full(50, i + 10 * n)) for i in range(8)] for n in range(10)]
            first = [client.score(batch) for batch in batches]
            assert min(s.backend.counters.score_tokens for s in (one, two)) > 1000
            two.call(two.app.stop)
            again = [client.score(batch) for batch in batches]
        for a, b in zip(first, again, strict=True):
            assert all((x.token_logprobs == y.token_logprobs).all() for x, y in zip(a, b, strict=True))


def test_a_client_says_how_it_sees_each_replica() -> None:
    away = f"127.0.0.1:{free_port()}"
    with over_grpc(ScriptedTeacher()) as a, connect([a, away], patience_s=5) as client:
        for _ in range(3):
            client.score(sequences(4))
        seen = {status.address: status for status in client.replicas()}
        assert (seen[a].state, seen[a].calls, seen[a].failed, seen[a].outstanding_tokens) == ("up", 3, 0, 0)
        assert seen[away].state in ("down", "waited for")
        assert seen[away].calls == seen[away].failed == 0
