"""Bytes that are no message, and broken messages, at each gRPC method: a status that says so, and no crash.

python -m tests.faults.test_raw_bytes 20000      # so many at each method of the teacher
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator

import grpc
import numpy as np
import pytest

from protos import codec
from protos.scores import GenerateRequest, Prompt, Sampling, ScoreRequest, ScoreSpec, Sequence
from protos.teacher.v1 import teacher_pb2 as pb
from tests.servers import Server, ended, serving, theory, wait_for
from tests.teacher_server.test_access import methods

GOOD = ScoreRequest((Sequence([1, 2, 3]),), ScoreSpec(2))
AT_ONCE = 50
"""Calls in flight."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server without keys that answers every method."""
    with serving(theory(max_sequence_tokens=200), cache={"enabled": False}) as running:
        yield running


def whole_messages() -> list[bytes]:
    """Serialised calls that make sense, for mutation."""
    (score,) = codec.encode_score_request(GOOD)
    prompt = Prompt(token_ids=[1, 2]), Prompt(text="ab")
    generate = codec.encode_generate_request(GenerateRequest(prompt, Sampling(3, seed=1)))
    head = pb.GetHeadRequest(fingerprint="x" * 9)
    return [message.SerializeToString() for message in (score, generate, head)]


def byte_strings(number: int, seed: int) -> Iterator[bytes]:
    """Random bytes, and messages with a few bytes changed, cut off or repeated."""
    rng, whole = np.random.default_rng(seed), whole_messages()
    for i in range(number):
        if i % 2:
            yield rng.bytes(int(rng.integers(0, 64)))
            continue
        data = bytearray(whole[int(rng.integers(len(whole)))])
        for _ in range(int(rng.integers(1, 4))):
            data[int(rng.integers(len(data)))] = int(rng.integers(256))
        cut = int(rng.integers(1, len(data) + 1))
        yield bytes(data[:cut]) if rng.random() < 0.3 else bytes(data) * int(rng.integers(1, 3))


def outcomes(server: Server, number: int) -> Counter[tuple[str, str]]:
    """(method, status) of each call; a stream that has begun is ended after its first answer."""
    found: Counter[tuple[str, str]] = Counter()
    with grpc.insecure_channel(server.grpc) as channel:
        for place, method in enumerate(sorted(methods(server))):
            call = channel.stream_stream(method)
            count = number if "teacher.v1" in method else number // 5
            running: list[grpc.Call] = []
            for data in byte_strings(count, place):
                running.append(call(iter([data]), timeout=30))
                if len(running) == AT_ONCE:
                    found.update((method, ended(one)) for one in running)
                    running.clear()
            found.update((method, ended(one)) for one in running)
    return found


SENSE = {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "UNIMPLEMENTED", "NOT_FOUND"}


@pytest.mark.parametrize("number", [500, pytest.param(2_000, marks=pytest.mark.slow)])
def test_no_byte_string_makes_a_method_fail_unexpectedly_or_the_server_stop(server: Server, number: int) -> None:
    check(server, number)


def check(server: Server, number: int) -> Counter[tuple[str, str]]:
    """Sends `number` byte strings to each method of the teacher, and fewer to health and reflection."""
    found = outcomes(server, number)
    assert {status for _, status in found} <= SENSE, found
    assert {method for method, _ in found} == methods(server)
    for name in ("Score", "Generate"):
        mine = {status for method, status in found if method.endswith(f"TeacherService/{name}")}
        assert {"OK", "INVALID_ARGUMENT"} <= mine, found
    wait_for(lambda: server.metric("teacher_in_flight", method="score") == 0)
    wait_for(lambda: server.metric("teacher_in_flight", method="generate") == 0)
    wait_for(lambda: server.metric("teacher_queue_tokens") == 0)
    assert server.metric("teacher_engine_restarts_total") == 0
    with grpc.insecure_channel(server.grpc) as channel:
        (answer,) = channel.stream_stream("/teacher.v1.TeacherService/Score")(iter([whole_messages()[0]]), timeout=30)
        assert answer
    return found


if __name__ == "__main__":
    with serving(theory(max_sequence_tokens=200), cache={"enabled": False}) as one:
        for what, times in sorted(check(one, int(sys.argv[1])).items()):
            print(times, *what)
