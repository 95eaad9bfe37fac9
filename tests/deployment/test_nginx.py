"""docker/nginx.conf in a real nginx before two real teachers: all calls pass, both work, and one of them may die."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from protos import errors
from protos.scores import Prompt, Sampling, ScoreSpec, Sequence
from student_trainer.teacher_client import TeacherClient, connect
from teacher_server.backends.theoretical_backend import Behaviour
from tests.servers import ROOT, Server, serving, theory, wait_for

NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
pytestmark = pytest.mark.skipif(NGINX is None, reason="no nginx here; apt-get install nginx-light")


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@dataclass
class Proxy:
    """Two teachers and the two addresses of the proxy before them."""

    teachers: list[Server]
    grpc: str
    http: str


def configuration(teachers: list[Server], grpc_port: int, http_port: int, folder: Path) -> str:
    """docker/nginx.conf with these addresses and nothing else changed."""
    text = (ROOT / "docker" / "nginx.conf").read_text()
    for number, teacher in enumerate(teachers, 1):
        text = text.replace(f"teacher-{number}:50051", teacher.grpc)
        text = text.replace(f"teacher-{number}:8000", teacher.http.removeprefix("http://"))
    text = re.sub(r"\n( *)listen 50051", rf"\n\1listen 127.0.0.1:{grpc_port}", text)
    text = re.sub(r"\n( *)listen 8000", rf"\n\1listen 127.0.0.1:{http_port}", text)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    head = f"daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\n"
    return head + text.replace("http {\n", f"http {{\naccess_log off;\n{temporary}", 1)


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """nginx as this user, until the tests are over."""
    with running(tmp_path_factory.mktemp("nginx"), Behaviour(hanging_id=251)) as found:
        yield found


@contextmanager
def running(folder: Path, behaviour: Behaviour) -> Iterator[Proxy]:
    """Two teachers behind an nginx."""
    assert NGINX is not None
    with ExitStack() as stack:
        teachers = [stack.enter_context(serving(theory(behaviour), cache={"enabled": False})) for _ in range(2)]
        ports = free_port(), free_port()
        (folder / "nginx.conf").write_text(configuration(teachers, *ports, folder))
        command = [NGINX, "-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", str(folder / "error.log")]
        process = stack.enter_context(subprocess.Popen(command))
        stack.callback(process.terminate)

        def listening() -> bool:
            assert process.poll() is None, (folder / "error.log").read_text()
            with socket.socket() as attempt:
                return attempt.connect_ex(("127.0.0.1", ports[1])) == 0

        wait_for(listening, 20)
        yield Proxy(teachers, f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}")


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


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_a_client_that_leaves_frees_the_teacher_behind(proxy: Proxy, kind: str) -> None:
    client = connect(getattr(proxy, kind))
    client.submit_score([Sequence([1, 251])])
    wait_for(lambda: sum(teacher.app.service.open_calls for teacher in proxy.teachers) == 1)
    client.close()
    wait_for(lambda: sum(teacher.app.service.open_calls for teacher in proxy.teachers) == 0)


@pytest.mark.parametrize("kind", ["grpc", "http"])
def test_a_teacher_that_stops_is_gone_round(tmp_path: Path, kind: str) -> None:
    with running(tmp_path, Behaviour()) as proxy, connect(getattr(proxy, kind), patience_s=30) as client:
        client.score([Sequence([1, 2, 3])])
        proxy.teachers[0].call(proxy.teachers[0].app.stop)
        for number in range(12):
            assert client.score([Sequence([4, 5, number])])[0].positions == 2
        assert proxy.teachers[1].backend.counters.scored >= 6
