"""One bad call among 31 good ones that are scored together: it fails alone, and the good ones' bits do not change.

python -m tests.faults.test_merged 1000
"""

from __future__ import annotations

import operator
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos import codec
from protos.scores import ScoreRequest, ScoreSpec, Sequence
from protos.teacher.v1 import teacher_pb2 as pb
from teacher_server.backends.factory import make_backend
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.theoretical_backend import Behaviour
from tests.servers import Server, serving, theory
from tests.tiny_qwen3 import make

FAILING, CALLS, TOKENS = 250, 32, 24


def bytes_of(*ids: int) -> bytes:
    """int32[N] as on the wire."""
    return np.array(ids, np.int32).tobytes()


BAD = {
    "fails in the engine": (pb.Sequence(token_ids=bytes_of(1, FAILING, 3)), "INTERNAL"),
    "an id of nobody": (pb.Sequence(token_ids=bytes_of(1, 2**31 - 1)), "INVALID_ARGUMENT"),
    "a negative id": (pb.Sequence(token_ids=bytes_of(-1, 2)), "INVALID_ARGUMENT"),
    "half an id": (pb.Sequence(token_ids=b"123456"), "INVALID_ARGUMENT"),
    "one token": (pb.Sequence(token_ids=bytes_of(1)), "INVALID_ARGUMENT"),
    "a start behind its end": (pb.Sequence(token_ids=bytes_of(1, 2, 3), score_start=9), "INVALID_ARGUMENT"),
    "too long": (pb.Sequence(token_ids=bytes_of(*[1] * 200)), "RESOURCE_EXHAUSTED"),
}


def good(number: int) -> list[pb.ScoreRequest]:
    """Good calls, the same for the same number."""
    rng = np.random.default_rng(number)
    rows = [Sequence(rng.integers(0, 240, TOKENS).astype(np.int32)) for _ in range(CALLS)]
    return [next(iter(codec.encode_score_request(ScoreRequest((row,), ScoreSpec(4))))) for row in rows]


def asked_at_once(call: Any, messages: list[pb.ScoreRequest]) -> list[str | bytes]:
    """What each call gives, all sent before any is waited for: the bytes of its answer, or its status."""
    running = [call(iter([message.SerializeToString()]), timeout=60) for message in messages]
    found: list[str | bytes] = []
    for one in running:
        try:
            found.append(b"".join(one))
        except grpc.RpcError as error:
            found.append(str(error.code().name))  # type: ignore[attr-defined]
    return found


def close(a: str | bytes, b: str | bytes) -> bool:
    """Whether two answers differ by rounding alone: a real engine's depends on the shape of its batch."""
    if isinstance(a, str) or isinstance(b, str):
        return False
    (one, other) = (codec.ScoreResponseReader(1).add_bytes(data) for data in (a, b))
    assert one is not None
    assert other is not None
    pairs = zip(one[1].arrays().values(), other[1].arrays().values(), strict=True)
    return all(np.allclose(x, y, atol=1e-4) for x, y in pairs)


def rounds(server: Server, number: int, kinds: list[str], same: Any = operator.eq) -> Counter[str]:
    """Puts a bad call at a random place among the good ones, `number` times; how the bad ones ended."""
    rng, ended = np.random.default_rng(0), Counter[str]()
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.stream_stream("/teacher.v1.TeacherService/Score")
        messages = good(1)
        right = asked_at_once(call, messages)
        assert all(isinstance(answer, bytes) for answer in right)
        for turn in range(number):
            sequence, status = BAD[kinds[turn % len(kinds)]]
            place = int(rng.integers(CALLS))
            mixed = list(messages)
            mixed[place] = pb.ScoreRequest(sequences=[sequence], top_k=4)
            answers = asked_at_once(call, mixed)
            assert answers[place] == status, (kinds[turn % len(kinds)], answers[place])
            ended[status] += 1
            wrong = [i for i in range(CALLS) if i != place and not same(answers[i], right[i])]
            assert not wrong, (turn, kinds[turn % len(kinds)], wrong)
    return ended


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A theoretical teacher that takes a while for each call, so that calls wait for each other."""
    make = theory(Behaviour(failing_id=FAILING, latency_s=0.002), max_sequence_tokens=100)
    with serving(make, cache={"enabled": False}) as running:
        yield running


@pytest.mark.parametrize("number", [50, pytest.param(100, marks=pytest.mark.slow)])
def test_a_bad_call_fails_alone_and_the_others_keep_their_bits(server: Server, number: int) -> None:
    ended = rounds(server, number, list(BAD))
    assert set(ended) == {"INTERNAL", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED"}


def broken_qwen3(folder: Path) -> Path:
    """A tiny Qwen3 whose numbers are none once it reads FAILING."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(make(folder / "whole"), tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[FAILING] = torch.nan
    model.save_pretrained(folder / "broken")
    AutoTokenizer.from_pretrained(folder / "whole").save_pretrained(folder / "broken")
    return folder / "broken"


@pytest.mark.slow
def test_the_same_up_to_rounding_in_batches_of_a_real_model(tmp_path: Path) -> None:
    options = BackendOptions(str(broken_qwen3(tmp_path)), dtype="float32", device="cpu", max_sequence_tokens=100)
    with serving(lambda: make_backend(options), cache={"enabled": False}) as running:
        ended = rounds(running, 12, ["fails in the engine", "an id of nobody", "too long"], close)
        assert ended["INTERNAL"] == 4
        assert running.metric("teacher_engine_restarts_total") == 0


if __name__ == "__main__":
    with serving(theory(Behaviour(failing_id=FAILING), max_sequence_tokens=100), cache={"enabled": False}) as one:
        print(rounds(one, int(sys.argv[1]), list(BAD)))
