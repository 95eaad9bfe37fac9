"""Score through the codec: what goes in comes out, however it was cut, and broken streams are noticed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import codec, errors
from protos import scores as domain
from protos.teacher.v1 import teacher_pb2 as pb
from tests.protos.strategies import same, scores, sequences, specs

LIMIT = 4 * 1024 * 1024


def read_request(messages: list[pb.ScoreRequest]) -> domain.ScoreRequest:
    reader = codec.ScoreRequestReader()
    for message in messages:
        reader.add_bytes(message.SerializeToString())
    return reader.finish()


@given(
    st.lists(sequences(), min_size=1, max_size=5), specs(), st.text(max_size=8), st.sampled_from([0, 4, 10, 64, 1024])
)
def test_a_score_request_survives_in_one_message_or_many(
    parts: list[domain.Sequence], spec: domain.ScoreSpec, fingerprint: str, chunk: int
) -> None:
    request = domain.ScoreRequest(tuple(parts), spec, fingerprint)
    assert same(read_request(list(codec.encode_score_request(request, chunk))), request)


def test_a_long_request_with_candidates_is_cut_into_messages_far_below_the_limit() -> None:
    n, c = 32_768, 128
    candidates = np.arange((n - 1) * c, dtype=np.int32).reshape(n - 1, c)
    request = domain.ScoreRequest((domain.Sequence(np.arange(n), 1, candidates),))
    messages = list(codec.encode_score_request(request, codec.CHUNK_BYTES))
    assert len(messages) > 10
    assert max(m.ByteSize() for m in messages) < LIMIT / 3
    assert same(read_request(messages), request)


@given(scores(), st.integers(1, 300))
def test_scores_survive_however_many_messages_they_take(value: domain.Scores, chunk: int) -> None:
    reader = codec.ScoreResponseReader(1)
    results = [reader.add_bytes(m.SerializeToString()) for m in codec.encode_scores(0, value, chunk)]
    assert results[:-1] == [None] * (len(results) - 1)
    assert results[-1] is not None
    assert same(results[-1], (0, value))
    assert reader.missing == 0


def test_scores_of_several_sequences_may_be_interleaved() -> None:
    first, second = (domain.Scores(token_logprobs=np.full(6, -i, np.float32)) for i in (1.0, 2.0))
    a, b = (list(codec.encode_scores(i, value, 8)) for i, value in enumerate((first, second)))
    reader = codec.ScoreResponseReader(2)
    done = [reader.add_bytes(m.SerializeToString()) for pair in zip(b, a, strict=True) for m in pair]
    assert [d[0] for d in done if d is not None] == [1, 0]
    assert reader.missing == 0


def test_a_sequence_of_32768_tokens_at_128_alternatives_passes_the_default_limit() -> None:
    t, k = 32_767, 128
    value = domain.Scores(
        token_logprobs=np.zeros(t, np.float32),
        top_token_ids=np.zeros((t, k), np.int32),
        top_logprobs=np.zeros((t, k), np.float32),
        log_normalizer=np.zeros((t, 1), np.float32),
        tail_logprob=np.zeros((t, 1), np.float32),
    )
    sizes = [m.ByteSize() for m in codec.encode_scores(0, value)]
    assert max(sizes) < LIMIT / 3
    assert sum(sizes) > 8 * LIMIT


def test_hidden_states_of_width_4096_pass_the_default_limit() -> None:
    value = domain.Scores(
        token_logprobs=np.zeros(1000, np.float32),
        hidden_states=np.arange(1000 * 4096, dtype=np.uint64).astype(np.uint16).reshape(1000, 4096),
    )
    messages = list(codec.encode_scores(0, value))
    assert max(m.ByteSize() for m in messages) < LIMIT / 3
    reader = codec.ScoreResponseReader(1)
    assert same([reader.add_bytes(m.SerializeToString()) for m in messages][-1], (0, value))


def messages_of(rows: int = 6) -> list[pb.ScoreResponse]:
    return list(codec.encode_scores(0, domain.Scores(token_logprobs=np.arange(rows, dtype=np.float32)), 8))


@pytest.mark.parametrize("fault", ["missing", "doubled", "unknown", "short", "odd"])
def test_a_broken_stream_of_scores_is_noticed(fault: str) -> None:
    messages = messages_of()
    if fault == "missing":
        del messages[1]
    elif fault == "doubled":
        messages.insert(1, messages[0])
    elif fault == "unknown":
        messages[1].index = 7
    elif fault == "odd":
        messages[1].hidden_states, messages[1].hidden_size = b"123456", 2
    else:
        messages[1].token_logprobs = b"1234"
    reader = codec.ScoreResponseReader(1)
    with pytest.raises(errors.TeacherFailed, match="the stream is broken"):
        [reader.add_bytes(message.SerializeToString()) for message in messages]


def test_a_stream_that_ends_early_leaves_sequences_missing() -> None:
    reader = codec.ScoreResponseReader(1)
    assert [reader.add_bytes(m.SerializeToString()) for m in messages_of()[:-1]] == [None, None]
    assert reader.missing == 1


def request_message(**changes: object) -> pb.ScoreRequest:
    part = {"index": 0, "token_ids": np.arange(4, dtype="<i4").tobytes(), "score_start": 1} | changes
    return pb.ScoreRequest(sequences=[pb.Sequence(**part)])


@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        (pb.ScoreRequest(), errors.InvalidRequest, "no sequences"),
        (request_message(index=1), errors.InvalidSequence, "sequence 1 came before sequence 0"),
        (request_message(token_ids=b"12345"), errors.InvalidSequence, "5 bytes, not a multiple of 4"),
        (request_message(token_ids=b"1234"), errors.InvalidSequence, "at least 2 tokens"),
        (request_message(score_start=4), errors.InvalidSequence, "score_start must be from 1 to 3 for 4 tokens, got 4"),
        (
            request_message(candidates=2, candidate_ids=b"1234"),
            errors.InvalidSequence,
            "1 candidate ids, expected 3 positions x 2",
        ),
    ],
)
def test_a_wrong_score_request_is_refused_with_the_numbers(
    message: pb.ScoreRequest, kind: type[errors.TeacherError], text: str
) -> None:
    with pytest.raises(kind, match=text) as caught:
        read_request([message])
    if kind is errors.InvalidSequence:
        assert caught.value.index == message.sequences[0].index


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"temperatures": [0.0]}, "temperatures must be finite and above 0, got 0.0"),
        ({"temperatures": [float("nan")]}, "temperatures must be finite"),
        ({"want": [pb.FIELD_TOP]}, "top_k is 0"),
        ({"want": [0]}, r"unknown fields \[0\]"),
    ],
)
def test_a_wrong_specification_is_refused(changes: dict[str, object], text: str) -> None:
    message = request_message()
    message.MergeFrom(pb.ScoreRequest(**changes))
    with pytest.raises(errors.InvalidSpec, match=text):
        read_request([message])


def test_a_reader_stops_at_its_limit_before_it_holds_the_call() -> None:
    reader = codec.ScoreRequestReader(max_bytes=20)
    reader.add(request_message())
    with pytest.raises(errors.TooLarge, match="more than 20 bytes"):
        reader.add(request_message())


def test_bytes_that_are_no_message_are_refused() -> None:
    with pytest.raises(errors.InvalidRequest, match=r"3 bytes is not a teacher\.v1\.ScoreRequest"):
        codec.ScoreRequestReader().add_bytes(b"\xff\xff\xff")
