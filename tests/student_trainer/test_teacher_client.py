"""The teacher client against real servers: results, splitting, retries, failover, deadlines, errors, closing."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos import errors
from protos.scores import Completion, Limits, Mode, Prompt, Sampling, ScoreSpec, Sequence
from student_trainer.teacher_client import connect
from student_trainer.teacher_client.transport import open_transport
from tests.student_trainer.live import OVER, ScriptedTeacher, over_grpc, teacher_info, theoretical_teacher


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with theoretical_teacher(tmp_path_factory.mktemp("teacher")) as addresses:
        yield addresses


@pytest.fixture(params=["grpc", "http"])
def over(request: pytest.FixtureRequest) -> Any:
    return OVER[request.param]


def sequences(*sizes: int) -> list[Sequence]:
    return [Sequence(np.arange(1, size + 1)) for size in sizes]


def scored(client: Any, *sizes: int) -> list[list[float]]:
    return [s.token_logprobs.tolist() for s in client.score(sequences(*sizes))]


def right(*sizes: int) -> list[list[float]]:
    return [[-float(i) for i in range(2, size + 1)] for size in sizes]


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_scores_and_completions_of_a_real_server_arrive(live: dict[str, str], transport: str) -> None:
    with connect(live[transport], name="tests") as client:
        info = client.teacher()
        spec = ScoreSpec(top_k=3, temperatures=(1.0, 2.0))
        candidates = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
        plain, asked = client.score([Sequence([5, 17, 29]), Sequence([5, 17, 29, 8], 1, candidates)], spec)
        assert plain.top_logprobs is not None
        assert plain.top_logprobs.shape == (2, 3)
        assert asked.candidate_logprobs is not None
        assert asked.candidate_logprobs.shape == (3, 2)
        assert asked.tail_logprob is not None
        assert asked.tail_logprob.shape == (3, 2)
        arrived: list[tuple[int, int]] = []
        prompts = [Prompt(text="hello", mode=Mode.THINKING), Prompt(token_ids=[1, 2, 3])]
        found = client.generate(
            prompts, Sampling(4, seed=7), n=2, logprobs=True, on_completion=lambda p, s, c: arrived.append((p, s))
        )
        assert sorted(arrived) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert [len(row) for row in found] == [2, 2]
        assert found[1][0].prompt_token_ids.tolist() == [1, 2, 3]
        assert found[0][0].logprobs is not None
        assert len(found[0][0].logprobs) == len(found[0][0].token_ids) <= 4
        assert client.teacher(refresh=True) == info


def test_both_transports_give_the_same(live: dict[str, str]) -> None:
    results = []
    for transport in ("grpc", "http"):
        with connect(live[transport]) as client:
            (scores,) = client.score([Sequence(np.arange(200) % 250, 3)], ScoreSpec(top_k=8, temperatures=(0.5, 3.0)))
            completions = client.generate([Prompt(text="same")], Sampling(8, seed=1))
            results.append((scores.arrays(), completions[0][0].token_ids))
    (a, x), (b, y) = results
    assert a.keys() == b.keys()
    assert all((a[name] == b[name]).all() for name in a)
    assert x.tolist() == y.tolist()


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_errors_of_a_real_server_keep_class_and_index(live: dict[str, str], transport: str) -> None:
    with connect(live[transport]) as client:
        with pytest.raises(errors.InvalidSequence, match="sequence 1, position 2: token id 999999") as caught:
            client.score([Sequence([1, 2]), Sequence([1, 2, 999_999])])
        assert caught.value.index == 1
        with pytest.raises(errors.TooLarge, match="top_k is 5000"):
            client.score([Sequence([1, 2])], ScoreSpec(top_k=5000))


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_a_sequence_of_megabytes_passes_both_ways(live: dict[str, str], transport: str) -> None:
    with connect(live[transport]) as client:
        n = 8192
        candidates = np.tile(np.arange(200, dtype=np.int32), (n - 1, 1))
        (scores,) = client.score([Sequence(np.arange(n) % 250, 1, candidates)], ScoreSpec(top_k=128))
        assert scores.candidate_logprobs is not None
        assert scores.candidate_logprobs.nbytes > 4 << 20
        assert scores.top_token_ids is not None
        assert scores.top_token_ids.shape == (n - 1, 128)


def test_calls_are_split_by_the_teachers_limits_and_joined_in_order(over: Any) -> None:
    teacher = ScriptedTeacher(
        info=teacher_info(limits=Limits(100, 8, 8, request_tokens=60, sequences=3, temperatures=8))
    )
    sizes = [50, 20, 30, 11, 2, 3, 4, 5, 60]
    with over(teacher) as address, connect(address, max_in_flight=3) as client:
        assert scored(client, *sizes) == right(*sizes)
    assert sum(teacher.sequences) == len(sizes)
    assert max(teacher.sequences) <= 3
    assert len(teacher.sequences) > 3


def test_an_error_in_a_split_call_names_the_callers_sequence(over: Any) -> None:
    teacher = ScriptedTeacher(info=teacher_info(limits=Limits(100, 8, 8, 200, sequences=2, temperatures=8)))
    bad = [*sequences(3, 3, 3), Sequence([1, 5000])]
    with over(teacher) as address, connect(address) as client:
        with pytest.raises(errors.InvalidSequence, match="sequence 3 has an id") as caught:
            client.score(bad)
        assert caught.value.index == 3


def test_no_sequences_need_no_call(over: Any) -> None:
    teacher = ScriptedTeacher()
    with over(teacher) as address, connect(address) as client:
        assert client.score([]) == []
        assert client.generate([], Sampling(1)) == []
    assert teacher.calls == 1


@pytest.mark.parametrize("kind", [errors.Unavailable, errors.Overloaded])
def test_retryable_errors_are_retried_until_they_pass(over: Any, kind: type[errors.TeacherError]) -> None:
    teacher = ScriptedTeacher([kind("not now", retry_after_s=0.05) for _ in range(3)])
    waits: list[str] = []
    with over(teacher) as address, connect(address, on_wait=waits.append) as client:
        assert scored(client, 4) == right(4)
    assert len(waits) == 3
    assert all("not now" in w and address in w for w in waits)


@pytest.mark.parametrize("kind", [k for k in errors.TABLE if not k.retryable], ids=lambda k: k.__name__)
def test_other_errors_are_raised_at_once(over: Any, kind: type[errors.TeacherError]) -> None:
    teacher = ScriptedTeacher()
    with over(teacher) as address, connect(address) as client:
        teacher.failures.append(kind("no"))
        before = teacher.calls
        with pytest.raises(kind) as caught:
            client.score(sequences(4))
        assert type(caught.value) is kind
        assert teacher.calls == before + 1


def test_an_overloaded_teacher_is_left_alone_for_the_delay_it_names(over: Any) -> None:
    teacher = ScriptedTeacher()
    with over(teacher) as address, connect(address) as client:
        teacher.failures.append(errors.Overloaded("full", retry_after_s=0.4))
        began = time.monotonic()
        client.score(sequences(4))
        assert time.monotonic() - began >= 0.4


def test_patience_ends_with_the_last_error_and_the_time(over: Any) -> None:
    teacher = ScriptedTeacher()
    with over(teacher) as address, connect(address, patience_s=0.3) as client:
        teacher.failures += [errors.Unavailable("loading", retry_after_s=0.05)] * 100
        with pytest.raises(errors.Unavailable, match=r"loading; waited 0 s"):
            client.score(sequences(4))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_nobody_at_the_address_is_unavailable_naming_it(scheme: str) -> None:
    address = f"{scheme}://127.0.0.1:{free_port()}"
    with pytest.raises(errors.Unavailable, match=f"no teacher answers at {address}"):
        connect(address, patience_s=0.2)


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_teacher_that_starts_late_is_waited_for(scheme: str) -> None:
    port, teacher = free_port(), ScriptedTeacher()
    waiting = threading.Event()
    found: list[list[list[float]]] = []

    def train() -> None:
        with connect(f"{scheme}://127.0.0.1:{port}", patience_s=20, on_wait=lambda _: waiting.set()) as client:
            found.append(scored(client, 4))

    thread = threading.Thread(target=train)
    thread.start()
    assert waiting.wait(10)
    with OVER[scheme](teacher, port):
        thread.join(20)
    assert found == [right(4)]


@pytest.mark.parametrize("scheme", ["grpc", "http"])
def test_a_restarted_teacher_is_found_again(scheme: str) -> None:
    with OVER[scheme](ScriptedTeacher()) as address:
        client = connect(address, patience_s=20)
        assert scored(client, 4) == right(4)
    port = int(address.rpartition(":")[2])
    later = threading.Timer(
        0.5, lambda: restarted.append(OVER[scheme](ScriptedTeacher(), port)) or restarted[0].__enter__()
    )
    restarted: list[Any] = []
    later.start()
    try:
        assert scored(client, 5) == right(5)
    finally:
        client.close()
        later.join()
        restarted[0].__exit__(None, None, None)


def test_another_teacher_at_the_address_is_refused(over: Any) -> None:
    teacher = ScriptedTeacher()
    with over(teacher) as address, connect(address) as client:
        teacher.info = teacher_info(fingerprint="f2")
        with pytest.raises(errors.TeacherMismatch, match="this is f2, not f1"):
            client.score(sequences(4))
        with pytest.raises(errors.TeacherMismatch, match="fingerprint f1, now it is scripted with fingerprint f2"):
            client.teacher(refresh=True)


def test_a_deadline_is_told_and_not_retried(over: Any) -> None:
    teacher = ScriptedTeacher()
    with over(teacher) as address, connect(address, timeout_s=0.3) as client:
        teacher.slow_s = 1.5
        before = teacher.calls
        with pytest.raises(errors.DeadlineExceeded, match=r"within 0\.3 s"):
            client.score(sequences(4))
        assert teacher.calls == before + 1


def test_futures_run_ahead_within_the_bound(over: Any) -> None:
    teacher = ScriptedTeacher(slow_s=0.02)
    with over(teacher) as address, connect(address, max_in_flight=3) as client:
        futures = [client.submit_score(sequences(size), ScoreSpec()) for size in range(2, 14)]
        results = [f.result()[0].token_logprobs for f in futures]
    assert [None if r is None else r.tolist() for r in results] == [right(size)[0] for size in range(2, 14)]
    assert 1 < teacher.most <= 3


def test_a_cancelled_future_drops_calls_that_have_not_begun(over: Any) -> None:
    teacher = ScriptedTeacher(slow_s=0.1)
    with over(teacher) as address, connect(address, max_in_flight=1) as client:
        first = client.submit_score(sequences(4), ScoreSpec())
        later = [client.submit_score(sequences(4), ScoreSpec()) for _ in range(5)]
        assert all(f.cancel() for f in later)
        assert len(first.result()) == 1
        with pytest.raises(CancelledError):
            later[0].result()
    assert len(teacher.sequences) <= 2


def test_closing_ends_calls_in_flight(over: Any) -> None:
    teacher = ScriptedTeacher(slow_s=3.0)
    with over(teacher) as address:
        teacher.slow_s = 0
        client = connect(address)
        teacher.slow_s = 3.0
        future = client.submit_score(sequences(4), ScoreSpec())
        queued = [client.submit_score(sequences(4), ScoreSpec()) for _ in range(8)]
        time.sleep(0.3)
        began = time.monotonic()
        client.close()
        assert time.monotonic() - began < 2
        for ended in (future, *queued):
            with pytest.raises(errors.Unavailable, match="closed"):
                ended.result()


def test_closing_ends_a_wait_for_a_teacher() -> None:
    with over_grpc(ScriptedTeacher()) as address:
        client = connect(address, patience_s=600)
    future = client.submit_score(sequences(4), ScoreSpec())
    time.sleep(0.3)
    client.close()
    with pytest.raises(errors.Unavailable):
        future.result()


def texts(found: list[list[Completion]]) -> list[list[str]]:
    return [[c.text for c in row] for row in found]


def test_completions_of_many_prompts_come_back_in_order(over: Any) -> None:
    teacher = ScriptedTeacher()
    words = [f"prompt {i}" for i in range(40)]
    with over(teacher) as address, connect(address, name="me") as client:
        found = client.generate([Prompt(text=w) for w in words], Sampling(4, seed=3), n=2)
    assert texts(found) == [[w, w] for w in words]
    assert [row[1].token_ids[0] - row[0].token_ids[0] for row in found] == [1] * 40
    assert max(teacher.prompts) * 2 <= 16
    assert set(teacher.seeds) == {3}
    assert set(teacher.names) == {"me"}


def test_more_samples_than_a_call_takes_are_drawn_with_other_seeds(over: Any) -> None:
    teacher = ScriptedTeacher()
    with over(teacher) as address, connect(address) as client:
        (row,) = client.generate([Prompt(text="a")], Sampling(4, seed=3), n=40)
    assert len(row) == 40
    assert len(teacher.seeds) == len(set(teacher.seeds)) == 3


def test_after_a_failure_only_missing_completions_are_asked_for_again(over: Any) -> None:
    teacher = ScriptedTeacher(cut_generate=3)
    arrived: list[int] = []
    with over(teacher) as address, connect(address) as client:
        found = client.generate(
            [Prompt(text=w) for w in "abcde"], Sampling(4), on_completion=lambda p, s, c: arrived.append(p)
        )
    assert texts(found) == [["a"], ["b"], ["c"], ["d"], ["e"]]
    assert sorted(arrived) == [0, 1, 2, 3, 4]
    assert teacher.prompts == [5, 4, 3, 2]


def test_an_error_in_the_callers_callback_reaches_the_caller(over: Any) -> None:
    def fail(prompt: int, sample: int, completion: Completion) -> None:
        raise ZeroDivisionError

    with over(ScriptedTeacher()) as address, connect(address) as client, pytest.raises(ZeroDivisionError):
        client.generate([Prompt(text="a")], Sampling(4), on_completion=fail)


def test_what_on_wait_raises_ends_the_wait(over: Any) -> None:
    class TeacherDiedError(Exception):
        pass

    def died(message: str) -> None:
        raise TeacherDiedError(message)

    teacher = ScriptedTeacher()
    with over(teacher) as address, connect(address, patience_s=600, on_wait=died) as client:
        teacher.failures += [errors.Unavailable("down")] * 100
        with pytest.raises(TeacherDiedError, match="down"):
            client.score(sequences(4))


@pytest.mark.parametrize("address", ["", "host", "ftp://a:1", "grpc://a", "grpc://a:1/x", "http://", "a:b"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="is no teacher address"):
        open_transport(address)


def test_a_web_server_that_is_no_teacher_is_told(tmp_path: Path) -> None:
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            """Nothing on standard error."""

        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", "2")
            self.end_headers()
            self.wfile.write(b"hi")

    server = ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        with pytest.raises(errors.Unavailable, match="is no teacher"):
            connect(f"http://127.0.0.1:{server.server_port}", patience_s=0)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_client_loads_without_torch_and_transformers() -> None:
    import subprocess
    import sys

    from tests.student_trainer.live import environment

    code = "import sys, student_trainer.teacher_client.grpc_channel, student_trainer.teacher_client.http_channel; "
    code += "sys.exit(bool({'torch', 'transformers', 'fastapi'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
