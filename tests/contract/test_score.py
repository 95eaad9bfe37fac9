"""Score, over every transport and backend, against float64 arithmetic on the whole distribution.

The whole distribution is the top V: the vocabularies of both backends are small enough to ask for it. Legend:
T positions, V vocabulary, K alternatives, M temperatures.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from protos.codec import CHUNK_BYTES
from protos.scores import TAIL_FLOOR, Field, ScoreRequest, Scores, ScoreSpec, Sequence
from tests.contract.wires import GrpcWire, HttpWire, Wire
from tests.servers import Server

TEMPERATURES = (1.0, 2.0, 0.5, 3.0)


def some_ids(n: int, seed: int = 0) -> np.ndarray:
    """int32[n] of plain tokens."""
    return np.random.default_rng(seed).integers(0, 256, n, dtype=np.int32)


def distribution(wire: Wire, sequence: Sequence) -> np.ndarray:
    """float64[T,V]: the log-probabilities of all tokens at each scored position."""
    size = wire.teacher().normalized_size
    vocabulary = wire.teacher().vocab_size
    assert size == vocabulary
    (scores,) = wire.score(ScoreRequest((sequence,), ScoreSpec(vocabulary, want=frozenset({Field.TOP}))))
    assert scores.top_token_ids is not None
    assert scores.top_logprobs is not None
    l_TV = np.full((sequence.positions, vocabulary), np.nan)
    np.put_along_axis(l_TV, scores.top_token_ids, scores.top_logprobs.astype(np.float64), 1)
    assert np.isfinite(l_TV).all()
    return l_TV


def logsumexp(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    top = x.max(axis=-1, keepdims=True)
    return (top + np.log(np.exp(x - top).sum(axis=-1, keepdims=True)))[..., 0]


def test_every_field_is_what_the_whole_distribution_says(wire: Wire) -> None:
    ids, start, k = some_ids(40), 5, 6
    candidates = np.stack([np.random.default_rng(t).permutation(256)[:3] for t in range(35)])
    sequence = Sequence(ids, start, candidates)
    l_TV = distribution(wire, Sequence(ids, start))
    (scores,) = wire.score(ScoreRequest((sequence,), ScoreSpec(k, TEMPERATURES)))
    assert set(scores.arrays()) == {
        "token_logprobs",
        "top_token_ids",
        "top_logprobs",
        "candidate_logprobs",
        "log_normalizer",
        "tail_logprob",
    }
    np.testing.assert_allclose(logsumexp(l_TV), 0, atol=1e-4)
    assert scores.token_logprobs is not None
    np.testing.assert_allclose(scores.token_logprobs, l_TV[np.arange(35), ids[start:]], atol=2e-5)
    order = np.argsort(-l_TV, axis=1, kind="stable")
    np.testing.assert_array_equal(scores.top_token_ids, order[:, :k])
    np.testing.assert_allclose(scores.top_logprobs, np.take_along_axis(l_TV, order[:, :k], 1), atol=2e-5)
    np.testing.assert_allclose(scores.candidate_logprobs, np.take_along_axis(l_TV, candidates, 1), atol=2e-5)
    assert scores.log_normalizer is not None
    assert scores.tail_logprob is not None
    for m, temperature in enumerate(TEMPERATURES):
        c = logsumexp(l_TV / temperature)
        np.testing.assert_allclose(scores.log_normalizer[:, m], c, atol=1e-4)
        tail = logsumexp(np.take_along_axis(l_TV, order[:, k:], 1) / temperature) - c
        np.testing.assert_allclose(scores.tail_logprob[:, m], np.maximum(tail, TAIL_FLOOR), atol=1e-4)


def test_the_log_normalizer_at_temperature_1_is_0_and_is_the_default(wire: Wire) -> None:
    (scores,) = wire.score(ScoreRequest((Sequence(some_ids(9)),)))
    assert set(scores.arrays()) == {"token_logprobs", "log_normalizer"}
    assert scores.log_normalizer is not None
    assert scores.log_normalizer.shape == (8, 1)
    np.testing.assert_allclose(scores.log_normalizer, 0, atol=1e-5)


def test_a_later_start_gives_the_last_rows_of_an_earlier_one(wire: Wire) -> None:
    ids = some_ids(30)
    spec = ScoreSpec(3, (1.0, 2.0))
    whole, late, last = wire.score(ScoreRequest((Sequence(ids, 1), Sequence(ids, 17), Sequence(ids, 29)), spec))
    for name, array in whole.arrays().items():
        np.testing.assert_allclose(getattr(late, name), array[16:], atol=2e-5, err_msg=name)
        np.testing.assert_allclose(getattr(last, name), array[28:], atol=2e-5, err_msg=name)


@pytest.mark.parametrize(
    "want",
    [set(pair) for n in (1, 2) for pair in itertools.combinations(Field, n)],
    ids=lambda w: "+".join(sorted(f.value for f in w)),
)
def test_only_the_wanted_fields_come_back(wire: Wire, want: set[Field]) -> None:
    sequence = Sequence(some_ids(6), 2, [[1, 2]] * 4)
    if wire.name == "json":
        want = want - {Field.HIDDEN_STATES} or {Field.TOP}
    (scores,) = wire.score(ScoreRequest((sequence,), ScoreSpec(2, want=frozenset(want))))
    names = {"top_token_ids", "top_logprobs"} if Field.TOP in want else set()
    assert set(scores.arrays()) == names | {field.value for field in want - {Field.TOP}}


def test_sequences_of_many_lengths_score_as_they_do_alone(wire: Wire) -> None:
    sequences = tuple(Sequence(some_ids(n, n), min(3, n - 1)) for n in (2, 70, 5, 33, 3, 128, 2, 64))
    spec = ScoreSpec(4, (1.0, 2.0))
    together = wire.score(ScoreRequest(sequences, spec))
    for sequence, scores in zip(sequences, together, strict=True):
        assert scores.positions == sequence.positions
        assert_close(scores, wire.score(ScoreRequest((sequence,), spec))[0])


def assert_close(one: Scores, other: Scores) -> None:
    """Equal to rounding; ids of nearly equal tokens may swap, their log-probabilities may not."""
    assert set(one.arrays()) == set(other.arrays())
    for name, array in one.arrays().items():
        if name != "top_token_ids":
            np.testing.assert_allclose(getattr(other, name), array, atol=3e-5, err_msg=name)


def test_all_transports_give_the_same_numbers(server: Server) -> None:
    from tests.contract.wires import WIRES

    request = ScoreRequest((Sequence(some_ids(50), 3, [[7, 3, 9]] * 47),), ScoreSpec(5, (1.0, 1.5)))
    results = []
    for make in WIRES.values():
        wire = make(server.grpc, server.http)
        results.append(wire.score(request)[0])
        wire.close()
    assert_close(results[0], results[1])
    assert_close(results[0], results[2])


def test_a_call_cut_into_many_messages_is_one_call(server: Server) -> None:
    wire = GrpcWire(server.grpc, server.http)
    sequences = tuple(Sequence(some_ids(100, i), 2, [[5, 4, 3]] * 98) for i in range(3))
    request = ScoreRequest(sequences, ScoreSpec(2, (2.0,)))
    for whole, cut in zip(wire.score(request), wire.score(request, chunk_bytes=64), strict=True):
        assert_close(whole, cut)
    wire.close()


def test_theory_knows_the_answers(theoretical_server: Server) -> None:
    sequence = Sequence(some_ids(60), 4, [[1, 100, 200]] * 56)
    spec = ScoreSpec(8, TEMPERATURES)
    truth = theoretical_server.backend.ring.score(sequence, spec)
    for make in (GrpcWire, HttpWire):
        wire: Any = make(theoretical_server.grpc, theoretical_server.http)
        (scores,) = wire.score(ScoreRequest((sequence,), spec))
        for name, array in truth.arrays().items():
            np.testing.assert_array_equal(getattr(scores, name), array, err_msg=name)
        wire.close()


@pytest.mark.parametrize("make", [GrpcWire, HttpWire])
@pytest.mark.parametrize("candidates", [0, 64])
def test_32768_tokens_at_128_alternatives_pass_with_default_channel_options(
    theoretical_server: Server, make: Any, candidates: int
) -> None:
    n = 32768
    ids = some_ids(n)
    named = (np.arange(n - 1)[:, None] + np.arange(candidates)) % 256 if candidates else None
    sequence = Sequence(ids, 1, named)
    wire = make(theoretical_server.grpc, theoretical_server.http)
    (scores,) = wire.score(ScoreRequest((sequence,), ScoreSpec(128)), chunk_bytes=1 << 20)
    assert wire.messages >= scores.nbytes // CHUNK_BYTES
    assert scores.top_logprobs is not None
    assert scores.top_logprobs.shape == (n - 1, 128)
    l_TV = theoretical_server.backend.ring.logprobs(ids[-4:-1])
    np.testing.assert_allclose(scores.top_logprobs[-3:], -np.sort(-l_TV, axis=1)[:, :128], atol=1e-6)
    if candidates:
        assert scores.candidate_logprobs is not None
        assert named is not None
        np.testing.assert_allclose(scores.candidate_logprobs[-3:], np.take_along_axis(l_TV, named[-3:], 1), atol=1e-6)
    wire.close()
