"""The proxies' configurations before two real teachers: all calls pass, both work, and one of them may die."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from protos import errors
from protos.scores import Prompt, Sampling, ScoreSpec, Sequence
from student_trainer.teacher_client import TeacherClient, connect
from teacher_server.backends.theoretical_backend import Behaviour
from tests.deployment.proxies import KINDS, Proxy, running
from tests.servers import wait_for


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    """A proxy that is on this machine."""
    name = str(request.param)
    if KINDS[name].binary is None:
        pytest.skip(f"no {name} here; {KINDS[name].hint}")
    return name


@pytest.fixture(scope="module")
def proxy(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """One of each kind until its tests are over."""
    with running(kind, tmp_path_factory.mktemp(kind), Behaviour(hanging_id=251)) as found:
        yield found


@pytest.fixture(params=["grpc", "http"])
def client(request: pytest.FixtureRequest, proxy: Proxy) -> Iterator[TeacherClient]:
    """A trainer's client of the proxy."""
    with connect(getattr(proxy, request.param), max_in_flight=4, patience_s=20) as found:
        yield found


def test_calls_of_megabytes_pass_both_ways(client: TeacherClient) -> None:
    length = 8192
    candidates = np.tile(np.arange(200, dtype=np.int32), (length - 1, 1))
    (scores,) = client.score([Sequence(np.arange(length) % 250, 1, candidates)], ScoreSpec(top_k=128))
    assert scores.candidate_logprobs is not None
    assert scores.candidate_logprobs.shape == (length - 1, 200)


def test_completions_stream_through(client: TeacherClient) -> None:
    found = client.generate([Prompt(text="hello"), Prompt(text="you")], Sampling(20, seed=1), n=2)
    assert [len(row) for row in found] == [2, 2]


def test_errors_keep_their_class_and_numbers(client: TeacherClient) -> None:
    with pytest.raises(errors.InvalidSequence, match="sequence 1, position 1") as caught:
        client.score([Sequence([1, 2]), Sequence([1, 999_999])])
    assert caught.value.index == 1
    with pytest.raises(errors.TooLarge, match="top_k is 5000"):
        client.score([Sequence([1, 2])], ScoreSpec(top_k=5000))


def test_both_teachers_work(proxy: Proxy, client: TeacherClient) -> None:
    before = [teacher.backend.counters.scored for teacher in proxy.teachers]
    for round_ in range(10):
        client.score([Sequence(np.random.default_rng(round_).integers(0, 250, 20)) for _ in range(4)])
    after = [teacher.backend.counters.scored for teacher in proxy.teachers]
    assert all(b > a for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_a_client_that_leaves_frees_the_teacher_behind(proxy: Proxy, transport: str) -> None:
    client = connect(getattr(proxy, transport))
    client.submit_score([Sequence([1, 251])])
    wait_for(lambda: sum(teacher.app.service.open_calls for teacher in proxy.teachers) == 1)
    client.close()
    wait_for(lambda: sum(teacher.app.service.open_calls for teacher in proxy.teachers) == 0)


def test_a_teacher_that_stops_is_gone_round(kind: str, tmp_path: Path) -> None:
    with running(kind, tmp_path, Behaviour()) as proxy:
        grpc, http = (connect(address, patience_s=30) for address in (proxy.grpc, proxy.http))
        with grpc, http:
            for client in (grpc, http):
                client.score([Sequence([1, 2, 3])])
            proxy.teachers[0].call(proxy.teachers[0].app.stop)
            for number in range(12):
                for client in (grpc, http):
                    assert client.score([Sequence([4, 5, number])])[0].positions == 2
            assert proxy.teachers[1].backend.counters.scored >= 12
