"""Every error of the table, provoked over every transport: class, status, reason, index, delay, and words."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos import errors
from protos.scores import (
    Field,
    GenerateRequest,
    Message,
    Mode,
    Prompt,
    Sampling,
    ScoreRequest,
    ScoreSpec,
    Sequence,
    TeacherInfo,
)
from teacher_server.auth import Permission
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.theoretical_backend import Behaviour, TheoreticalBackend
from teacher_server.key_watch import KeyAuthenticator
from teacher_server.keys import make_key, write
from tests.contract.wires import WIRES, HttpWire, Wire
from tests.servers import Server, serving, theory, wait_for

FAILING, HANGING = 250, 251
LIMITS = {
    "max_sequence_tokens": 100,
    "max_request_tokens": 300,
    "max_sequences": 8,
    "max_top_k": 16,
    "max_candidates": 4,
    "max_temperatures": 2,
}


@pytest.fixture(scope="module")
def small_server() -> Iterator[Server]:
    """A teacher with small limits that fails and hangs on request."""
    with serving(theory(Behaviour(failing_id=FAILING, hanging_id=HANGING), **LIMITS)) as server:
        yield server


@pytest.fixture(params=list(WIRES))
def make_wire(request: pytest.FixtureRequest) -> Iterator[Callable[..., Wire]]:
    """Makes wires of each transport and closes them."""
    made: list[Wire] = []

    def make(server: Server, **options: Any) -> Wire:
        made.append(WIRES[request.param](server.grpc, server.http, **options))
        return made[-1]

    yield make
    for wire in made:
        wire.close()


def ids(n: int) -> np.ndarray:
    """int32[n]."""
    return np.arange(n, dtype=np.int32) % 200


def expect(wire: Wire, call: Callable[[], Any], kind: type[errors.TeacherError], words: str, index: int | None = None):
    """The call fails with exactly that class, its row of the table, and these words."""
    with pytest.raises(errors.TeacherError) as caught:
        call()
    error = caught.value
    assert type(error) is kind, repr(error)
    assert re.search(words, error.message), error.message
    assert error.index == index
    assert wire.raw is not None
    if wire.name == "grpc":
        assert wire.raw.status == kind.grpc_code
    else:
        body = wire.raw.body
        assert wire.raw.status == body["status"] == kind.http_status
        assert body["reason"] == error.reason
        assert body["type"] == f"{errors.DOMAIN}:{error.reason.lower().replace('_', '-')}"
        assert body["title"]
        assert body["instance"] == f"urn:uuid:{wire.raw.headers['x-request-id']}"
    assert wire.raw.retry == kind.retryable
    assert (error.retry_after_s is not None) == kind.retryable
    return error


@dataclass(frozen=True)
class Refused:
    """A Score call that is refused."""

    request: ScoreRequest
    kind: type[errors.TeacherError]
    words: str
    index: int | None = None


GOOD = Sequence(ids(10))
SCORE_CASES = {
    "fingerprint": Refused(ScoreRequest((GOOD,), fingerprint="other"), errors.TeacherMismatch, "other.*fingerprint"),
    "sequence too long": Refused(
        ScoreRequest((GOOD, GOOD, Sequence(ids(101)))),
        errors.TooLarge,
        "^sequence 2 has 101 tokens, this teacher accepts 100$",
        2,
    ),
    "call too long": Refused(ScoreRequest((Sequence(ids(99)),) * 4), errors.TooLarge, "396 tokens.*accepts 300"),
    "too many sequences": Refused(ScoreRequest((GOOD,) * 9), errors.TooLarge, "9 sequences.*accepts 8"),
    "top_k": Refused(ScoreRequest((GOOD,), ScoreSpec(17)), errors.TooLarge, "top_k is 17.*accepts 16"),
    "temperatures": Refused(
        ScoreRequest((GOOD,), ScoreSpec(temperatures=(1.0, 2.0, 3.0))), errors.TooLarge, "3 temperatures.*accepts 2"
    ),
    "candidates": Refused(
        ScoreRequest((Sequence(ids(3), 1, [[1, 2, 3, 4, 5]] * 2),)), errors.TooLarge, "5 candidates.*accepts 4", 0
    ),
    "id above": Refused(
        ScoreRequest((GOOD, Sequence([1, 2, 261, 3]))),
        errors.InvalidSequence,
        "^sequence 1, position 2: token id 261, ids of this teacher are from 0 to 260$",
        1,
    ),
    "id below": Refused(ScoreRequest((Sequence([1, -1]),)), errors.InvalidSequence, "position 1: token id -1", 0),
    "candidate above": Refused(
        ScoreRequest((Sequence([1, 2, 3, 4], 2, [[5, 6], [7, 300]]),)),
        errors.InvalidSequence,
        "sequence 0, position 3: candidate 1 is 300",
        0,
    ),
    "candidate twice": Refused(
        ScoreRequest((GOOD, Sequence([1, 2, 3], 1, [[5, 6], [7, 7]]))),
        errors.InvalidSequence,
        "sequence 1, position 2: candidate 7 is named more than once",
        1,
    ),
    "candidates wanted": Refused(
        ScoreRequest((Sequence([1, 2], 1, [[3]]), GOOD), ScoreSpec(want=frozenset({Field.CANDIDATE_LOGPROBS}))),
        errors.InvalidSequence,
        "sequence 1 names no candidates",
        1,
    ),
}


@pytest.mark.parametrize("case", SCORE_CASES.values(), ids=list(SCORE_CASES))
def test_score_refuses_the_whole_call_before_any_work(
    small_server: Server, make_wire: Callable[..., Wire], case: Refused
) -> None:
    wire = make_wire(small_server)
    before = small_server.backend.counters.scored
    expect(wire, lambda: wire.score(case.request), case.kind, case.words, case.index)
    assert small_server.backend.counters.scored == before


PROMPT = Prompt(text="hello")
SAMPLING = Sampling(max_tokens=5)
GENERATE_CASES: dict[str, tuple[GenerateRequest, type[errors.TeacherError], str, int | None]] = {
    "fingerprint": (
        GenerateRequest((PROMPT,), SAMPLING, fingerprint="x"),
        errors.TeacherMismatch,
        "fingerprint x",
        None,
    ),
    "samples": (GenerateRequest((PROMPT,) * 3, SAMPLING, 3), errors.TooLarge, "3 prompts times 3 samples = 9", None),
    "length": (
        GenerateRequest((PROMPT, Prompt(token_ids=ids(97))), SAMPLING),
        errors.TooLarge,
        "prompt 1 has 97 tokens and max_tokens is 5, together 102; this teacher accepts 100",
        1,
    ),
    "stop id": (
        GenerateRequest((PROMPT,), Sampling(5, stop_token_ids=(1, 400))),
        errors.InvalidSpec,
        "stop_token_ids names 400",
        None,
    ),
    "prompt id": (
        GenerateRequest((PROMPT, Prompt(token_ids=[1, 270])), SAMPLING),
        errors.InvalidSequence,
        "prompt 1, position 1: token id 270",
        1,
    ),
    "role": (
        GenerateRequest((PROMPT, Prompt((Message("jester", "x"),))), SAMPLING),
        errors.InvalidSequence,
        "prompt 1: .*jester",
        1,
    ),
    "tokens in all": (
        GenerateRequest((Prompt(token_ids=ids(80)),) * 4, SAMPLING),
        errors.TooLarge,
        "320 tokens in all.*accepts 300",
        None,
    ),
}


@pytest.mark.parametrize("case", GENERATE_CASES.values(), ids=list(GENERATE_CASES))
def test_generate_refuses_the_whole_call_before_any_work(
    small_server: Server, make_wire: Callable[..., Wire], case: Any
) -> None:
    request, kind, words, index = case
    wire = make_wire(small_server)
    before = small_server.backend.counters.generated
    expect(wire, lambda: wire.generate(request), kind, words, index)
    assert small_server.backend.counters.generated == before


class ScoreOnly(TheoreticalBackend):
    """A teacher without tails, without generation and with one mode."""

    @property
    def info(self) -> TeacherInfo:
        """Less than the parent's."""
        less = frozenset(Field) - {Field.TAIL_LOGPROB}
        return dataclasses.replace(
            super().info, fields=less, can_generate=self.behaviour.kappa == 2, modes=(Mode.THINKING,)
        )


def test_what_a_teacher_cannot_do_is_unsupported(make_wire: Callable[..., Wire]) -> None:
    with serving(lambda: ScoreOnly(BackendOptions(model="m"))) as server:
        wire = make_wire(server)
        call = ScoreRequest((GOOD,), ScoreSpec(2))
        expect(wire, lambda: wire.score(call), errors.Unsupported, "cannot give tail_logprob; it gives candidate", 0)
        wanted = dataclasses.replace(call, spec=ScoreSpec(2, want=frozenset({Field.TOP})))
        assert set(wire.score(wanted)[0].arrays()) == {"top_token_ids", "top_logprobs"}
        request = GenerateRequest((PROMPT,), SAMPLING)
        expect(wire, lambda: wire.generate(request), errors.Unsupported, "does not generate")
    with serving(lambda: ScoreOnly(BackendOptions(model="m"), Behaviour(kappa=2))) as server:
        wire = make_wire(server)
        request = GenerateRequest((PROMPT, Prompt(text="x", mode=Mode.NON_THINKING)), SAMPLING)
        expect(wire, lambda: wire.generate(request), errors.Unsupported, "prompt 1 asks for the mode non_thinking", 1)


def test_a_failing_engine_is_reported_in_fixed_words_and_hurts_nobody_else(
    small_server: Server, make_wire: Callable[..., Wire]
) -> None:
    wire = make_wire(small_server)
    words = "^" + re.escape(errors.TeacherFailed.TEXT) + "$"
    expect(wire, lambda: wire.score(ScoreRequest((Sequence([1, FAILING, 2]),))), errors.TeacherFailed, words)
    request = GenerateRequest((Prompt(token_ids=[1, FAILING]),), SAMPLING)
    expect(wire, lambda: wire.generate(request), errors.TeacherFailed, words)
    assert wire.score(ScoreRequest((GOOD,)))[0].positions == 9


class NotFinite(TheoreticalBackend):
    """A teacher whose arithmetic broke, and one that raises what nobody expects."""

    async def score(self, sequence: Sequence, spec: ScoreSpec) -> Any:
        """NaN in one place, or a crash."""
        scores = await super().score(sequence, spec)
        if self.behaviour.kappa == 2:
            raise KeyError("a secret path")
        assert scores.token_logprobs is not None
        scores.token_logprobs[-1] = np.nan
        return scores


@pytest.mark.parametrize("kappa", [3.0, 2.0])
def test_a_number_that_is_not_finite_and_an_unexpected_exception_are_a_failed_teacher(
    make_wire: Callable[..., Wire], kappa: float
) -> None:
    with serving(lambda: NotFinite(BackendOptions(model="m"), Behaviour(kappa=kappa))) as server:
        wire = make_wire(server)
        words = "^" + re.escape(errors.TeacherFailed.TEXT) + "$"
        expect(wire, lambda: wire.score(ScoreRequest((GOOD,))), errors.TeacherFailed, words)
        assert server.metric("teacher_requests_total", outcome="TEACHER_FAILED") == 1


def test_an_error_after_the_stream_began_is_an_error_of_the_tree(small_server: Server) -> None:
    wire = HttpWire(small_server.grpc, small_server.http, timeout=0.3)
    with pytest.raises(errors.DeadlineExceeded, match=r"0\.3 s passed with 1 of 2 sequences unanswered"):
        wire.score(ScoreRequest((GOOD, Sequence([1, HANGING]))))
    assert wire.messages == 1, "the first sequence came with status 200"
    assert wire.raw is None
    wire.close()


def test_a_full_queue_is_overloaded_with_a_delay(make_wire: Callable[..., Wire]) -> None:
    with serving(theory(Behaviour(hanging_id=HANGING)), queue_tokens=100, cache={"enabled": False}) as server:
        import threading

        blocked = make_wire(server, timeout=30)
        hanging = ScoreRequest((Sequence([*range(90), HANGING]),))

        def hang() -> None:
            with pytest.raises(errors.TeacherError):
                blocked.score(hanging)

        thread = threading.Thread(target=hang)
        thread.start()
        wait_for(lambda: server.metric("teacher_queue_tokens") == 91)
        wire = make_wire(server)
        request = ScoreRequest((Sequence(ids(10)),))
        error = expect(
            wire, lambda: wire.score(request), errors.Overloaded, "holds 91 of 100 tokens.*10 tokens in 1 seq"
        )
        assert error.retry_after_s > 0
        server.call(server.app.stop)
        thread.join()


def test_a_deadline_that_passes_in_the_queue_is_reported(make_wire: Callable[..., Wire], small_server: Server) -> None:
    wire = make_wire(small_server, timeout=0.3)
    with pytest.raises(errors.DeadlineExceeded) as caught:
        wire.score(ScoreRequest((Sequence([1, HANGING]),)))
    if wire.name != "grpc":  # over gRPC the client's own clock may be first, and then there are no words
        assert "0.3 s passed with" in caught.value.message
        assert wire.raw is not None
        assert wire.raw.status == 504
    with pytest.raises(errors.DeadlineExceeded):
        wire.generate(GenerateRequest((Prompt(token_ids=[HANGING]),), SAMPLING))
    wait_for(lambda: small_server.metric("teacher_queue_tokens") == 0)


def test_a_loading_teacher_is_unavailable_with_a_delay(make_wire: Callable[..., Wire]) -> None:
    import threading

    loaded = threading.Event()

    def make_backend() -> TheoreticalBackend:
        loaded.wait(30)
        return theory()()

    with serving(make_backend, wait_ready=False) as server:
        wire = make_wire(server)
        expect(wire, wire.teacher, errors.Unavailable, "the teacher is loading")
        expect(wire, lambda: wire.score(ScoreRequest((GOOD,))), errors.Unavailable, "loading")
        expect(wire, lambda: wire.generate(GenerateRequest((PROMPT,), SAMPLING)), errors.Unavailable, "loading")
        loaded.set()
        wait_for(lambda: server.app.service.state.name == "READY")
        assert wire.score(ScoreRequest((GOOD,)))[0].positions == 9


def test_a_draining_teacher_is_unavailable_with_a_delay(make_wire: Callable[..., Wire]) -> None:
    with serving(theory()) as server:
        wire = make_wire(server)
        server.call(server.app.service.drain)
        wait_for(lambda: server.app.service.state.name == "DRAINING")
        expect(wire, lambda: wire.score(ScoreRequest((GOOD,))), errors.Unavailable, "shutting down")


def test_a_crashed_engine_is_unavailable(make_wire: Callable[..., Wire]) -> None:
    with serving(theory(Behaviour(crashing_id=7))) as server:
        wire = make_wire(server)
        expect(
            wire,
            lambda: wire.score(ScoreRequest((Sequence([1, 7]),))),
            errors.Unavailable,
            "engine died and is started again",
        )


def test_an_unknown_and_a_forbidden_client_are_refused(make_wire: Callable[..., Wire], tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    key, stored = make_key("scorer", may=[Permission.SCORE])
    write(file, [stored])
    with serving(theory(), KeyAuthenticator(file)) as server:
        for other in ("", "nonsense", make_key("scorer")[0]):
            wire = make_wire(server, key=other)
            for call in (wire.teacher, lambda wire=wire: wire.score(ScoreRequest((GOOD,)))):
                expect(wire, call, errors.Unauthenticated, "key")
        wire = make_wire(server, key=key)
        assert wire.score(ScoreRequest((GOOD,)))
        request = GenerateRequest((PROMPT,), SAMPLING)
        expect(wire, lambda: wire.generate(request), errors.PermissionDenied, "scorer allows score, and this needs gen")


def test_every_class_of_the_table_is_provoked_here() -> None:
    import inspect
    import sys

    source = inspect.getsource(sys.modules[__name__])
    missing = [kind.__name__ for kind in errors.TABLE if f"errors.{kind.__name__}" not in source]
    assert missing == ["InvalidRequest"], "InvalidRequest itself is test_malformed.py's"
