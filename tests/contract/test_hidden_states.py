"""Hidden states and the LM head: together they are the distribution that the teacher's own log-probabilities come from,
and both are refused where they would not be."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from protos import errors
from protos.head import logits
from protos.scores import Field, ScoreRequest, ScoreSpec, Sequence, TeacherInfo
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.theoretical_backend import TheoreticalBackend
from tests.contract.wires import WIRES, Wire
from tests.servers import Server, serving, theory

WANT = frozenset({Field.HIDDEN_STATES, Field.TOKEN_LOGPROBS, Field.TOP, Field.LOG_NORMALIZER})
BINARY = [name for name in WIRES if name != "json"]
IDS = (np.arange(60) * 7919 + 13) % 250


@pytest.fixture(scope="module")
def small() -> Iterator[Server]:
    """A server with a cache that holds 1 MiB of hidden states."""
    with serving(theory(), hidden_mib=1) as server:
        yield server


@pytest.fixture(params=BINARY)
def binary(request: pytest.FixtureRequest, server: Server) -> Iterator[Wire]:
    """Each transport that carries hidden states, to each backend's server."""
    made = WIRES[request.param](server.grpc, server.http)
    yield made
    made.close()


def log_softmax(z: np.ndarray) -> np.ndarray:
    z = z - z.max(axis=-1, keepdims=True)
    return np.asarray(z - np.log(np.exp(z).sum(axis=-1, keepdims=True)))


def test_head_times_hidden_states_is_the_distribution_that_the_teacher_reports(binary: Wire) -> None:
    info, head = binary.teacher(), binary.head()
    sequences = (Sequence(IDS[:40], 1), Sequence(IDS, 25))
    results = binary.score(ScoreRequest(sequences, ScoreSpec(9, (1.0, 2.0), WANT)))
    assert head.weight.shape == (info.vocab_size, info.hidden_size)
    for sequence, scores in zip(sequences, results, strict=True):
        assert scores.hidden_states is not None
        assert scores.top_token_ids is not None
        assert scores.token_logprobs is not None
        assert scores.hidden_states.shape == (sequence.positions, info.hidden_size)
        z_TV = logits(scores.hidden_states, info.hidden_dtype, head).astype(np.float64)
        l_TV = log_softmax(z_TV)
        tokens = sequence.token_ids[sequence.score_start :, None]
        assert np.allclose(np.take_along_axis(l_TV, tokens, 1)[:, 0], scores.token_logprobs, atol=1e-5)
        assert np.allclose(np.take_along_axis(l_TV, scores.top_token_ids, 1), scores.top_logprobs, atol=1e-5)
        warm = l_TV / 2 - log_softmax(z_TV / 2)
        assert np.allclose(warm[:, 0], scores.log_normalizer[:, 1], atol=1e-5)


def test_hidden_states_alone_and_beside_others_are_the_same(binary: Wire) -> None:
    sequence = Sequence(IDS, 3)
    alone, beside = (
        binary.score(ScoreRequest((sequence,), ScoreSpec(1, want=want)))[0]
        for want in (frozenset({Field.HIDDEN_STATES}), WANT)
    )
    assert set(alone.arrays()) == {"hidden_states"}
    assert np.allclose(alone.hidden_states, beside.hidden_states, atol=1e-5)


def test_hidden_states_come_only_where_they_are_named(wire: Wire) -> None:
    (scores,) = wire.score(ScoreRequest((Sequence(IDS, 3),), ScoreSpec(2)))
    assert scores.hidden_states is None


def test_json_refuses_hidden_states_and_says_what_to_do(server: Server) -> None:
    wire = WIRES["json"](server.grpc, server.http)
    with pytest.raises(errors.Unsupported, match=r"too large for JSON; send the call as application/x-protobuf"):
        wire.score(ScoreRequest((Sequence(IDS, 3),), ScoreSpec(want=frozenset({Field.HIDDEN_STATES}))))
    wire.close()


def test_the_head_of_another_teacher_is_refused(binary: Wire) -> None:
    with pytest.raises(errors.TeacherMismatch, match="fingerprint nobody"):
        binary.head("nobody")
    assert binary.head(binary.teacher().fingerprint).total_rows == binary.teacher().vocab_size


def test_calls_for_the_head_are_counted(server: Server, binary: Wire) -> None:
    labels = {"method": "head", "outcome": "OK", "transport": binary.name}
    before = server.metric("teacher_requests_total", **labels)
    binary.head()
    assert server.metric("teacher_requests_total", **labels) == before + 1


class Sealed(TheoreticalBackend):
    """A teacher that keeps its hidden states to itself."""

    @property
    def info(self) -> TeacherInfo:
        """Without them."""
        fields = frozenset(Field) - {Field.HIDDEN_STATES}
        return replace(super().info, fields=fields, hidden_size=0, hidden_dtype="")


@pytest.fixture(scope="module")
def sealed() -> Iterator[Server]:
    """Its server."""
    with serving(lambda: Sealed(BackendOptions(model="m"))) as server:
        yield server


@pytest.mark.parametrize("name", BINARY)
def test_a_teacher_that_does_not_offer_them_refuses_both(sealed: Server, name: str) -> None:
    wire = WIRES[name](sealed.grpc, sealed.http)
    with pytest.raises(errors.Unsupported, match="cannot give hidden_states"):
        wire.score(ScoreRequest((Sequence(IDS, 3),), ScoreSpec(want=frozenset({Field.HIDDEN_STATES}))))
    with pytest.raises(errors.Unsupported, match="does not give hidden states, so its LM head is not given either"):
        wire.head()
    wire.close()


@pytest.mark.parametrize("name", BINARY)
def test_more_hidden_states_than_the_server_holds_are_refused_with_the_numbers(name: str, small: Server) -> None:
    wire = WIRES[name](small.grpc, small.http)
    spec = ScoreSpec(want=frozenset({Field.HIDDEN_STATES}))
    long = Sequence(np.tile(IDS, 500), 1)
    with pytest.raises(errors.TooLarge, match=r"149995 positions, 8 bytes each, take 1199960 bytes.*holds 1048576"):
        wire.score(ScoreRequest((long,) * 5, spec))
    assert len(wire.score(ScoreRequest((long,) * 4, spec))) == 4
    assert small.metric("teacher_hidden_bytes") == 0
    wire.close()


def test_hidden_states_are_not_kept_in_the_cache(small: Server) -> None:
    wire = WIRES["grpc"](small.grpc, small.http)
    call = ScoreRequest((Sequence(IDS, 3),), ScoreSpec(want=WANT - {Field.TOP}))
    before, kept = small.backend.counters.scored, small.metric("teacher_cache_bytes")
    wire.score(call)
    wire.score(call)
    assert small.backend.counters.scored == before + 2
    assert small.metric("teacher_cache_bytes") == kept
    wire.close()
