"""GetTeacher, Generate and frames through the codec."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import codec, errors
from protos import scores as domain
from protos.teacher.v1 import teacher_pb2 as pb
from tests.protos.strategies import deltas, prompts, same, samplings, teachers


@given(teachers)
def test_a_teacher_survives(info: domain.TeacherInfo) -> None:
    back = codec.decode_teacher_bytes(codec.encode_teacher(info).SerializeToString())
    assert back == info


@given(st.lists(prompts(), min_size=1, max_size=4), samplings, st.integers(1, 9), st.booleans(), st.booleans())
def test_a_generate_request_survives(
    parts: list[domain.Prompt], sampling: domain.Sampling, n: int, logprobs: bool, stream: bool
) -> None:
    request = domain.GenerateRequest(tuple(parts), sampling, n, logprobs, stream, "f")
    back = codec.decode_generate_request_bytes(codec.encode_generate_request(request).SerializeToString())
    assert same(back, request)


@given(st.lists(deltas(), max_size=4))
def test_pieces_of_completions_survive(pieces: list[domain.CompletionDelta]) -> None:
    assert same(codec.decode_deltas_bytes(codec.encode_deltas(pieces).SerializeToString()), pieces)


def test_what_a_generate_request_leaves_out_has_the_documented_meaning() -> None:
    message = pb.GenerateRequest(prompts=[pb.Prompt(text="a")], sampling=pb.Sampling(max_tokens=3))
    request = codec.decode_generate_request(message)
    assert request.n == 1
    assert request.prompts[0].mode is None
    assert request.sampling == domain.Sampling(max_tokens=3, temperature=1.0, top_p=1.0, seed=None)


def test_an_unset_temperature_differs_from_a_greedy_one() -> None:
    greedy = domain.GenerateRequest((domain.Prompt(text="a"),), domain.Sampling(1, temperature=0.0, seed=0))
    back = codec.decode_generate_request(codec.encode_generate_request(greedy))
    assert (back.sampling.temperature, back.sampling.seed) == (0.0, 0)


@pytest.mark.parametrize(
    ("message", "kind", "text"),
    [
        (pb.GenerateRequest(), errors.InvalidRequest, "no prompts"),
        (pb.GenerateRequest(prompts=[pb.Prompt(text="a")]), errors.InvalidSpec, "max_tokens must be at least 1, got 0"),
        (
            pb.GenerateRequest(prompts=[pb.Prompt()], sampling=pb.Sampling(max_tokens=1)),
            errors.InvalidSequence,
            "prompt 0: a prompt needs exactly one of messages, token_ids and text, got 0",
        ),
        (
            pb.GenerateRequest(prompts=[pb.Prompt(text="a", token_ids=b"1234")], sampling=pb.Sampling(max_tokens=1)),
            errors.InvalidSequence,
            "got 2",
        ),
        (
            pb.GenerateRequest(prompts=[pb.Prompt(text="a", mode=9)], sampling=pb.Sampling(max_tokens=1)),
            errors.InvalidSequence,
            "unknown mode 9",
        ),
        (
            pb.GenerateRequest(prompts=[pb.Prompt(text="a")], sampling=pb.Sampling(max_tokens=1, top_p=1.5)),
            errors.InvalidSpec,
            "top_p must be above 0 and at most 1, got 1.5",
        ),
    ],
)
def test_a_wrong_generate_request_is_refused(
    message: pb.GenerateRequest, kind: type[errors.TeacherError], text: str
) -> None:
    with pytest.raises(kind, match=text):
        codec.decode_generate_request(message)


@given(st.lists(st.binary(max_size=50), max_size=6), st.integers(1, 7))
def test_frames_survive_any_cut(messages: list[bytes], step: int) -> None:
    data = b"".join(codec.frame(m) for m in messages)
    chunks = [data[i : i + step] for i in range(0, len(data), step)]
    assert list(codec.unframe(chunks)) == messages


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=4), st.data())
def test_a_stream_that_ends_inside_a_frame_is_noticed(messages: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(codec.frame(m) for m in messages)
    borders = {len(b"".join(codec.frame(m) for m in messages[:i])) for i in range(len(messages) + 1)}
    end = data.draw(st.integers(1, len(whole) - 1).filter(lambda i: i not in borders)) if len(whole) > 1 else 1
    with pytest.raises(errors.TeacherFailed, match="the stream is broken"):
        list(codec.unframe([whole[:end]]))


def test_an_error_frame_ends_a_stream_after_the_messages_before_it() -> None:
    data = codec.frame(b"one") + codec.frame(b"two") + codec.frame_error(errors.Overloaded("full", retry_after_s=1.5))
    for step in (1, 5, len(data)):
        stream = codec.unframe([data[i : i + step] for i in range(0, len(data), step)])
        assert [next(stream), next(stream)] == [b"one", b"two"]
        with pytest.raises(errors.Overloaded, match="full") as caught:
            next(stream)
        assert caught.value.retry_after_s == 1.5


def test_an_absurd_frame_length_reserves_no_memory() -> None:
    with pytest.raises(errors.TeacherFailed, match="bytes is announced"):
        list(codec.unframe([(2**31 - 1).to_bytes(4, "little")]))


def test_big_endian_and_strided_arrays_are_sent_as_little_endian_rows() -> None:
    strided = np.arange(12, dtype=np.int32)[::2]
    request = domain.ScoreRequest((domain.Sequence(strided),))
    (message,) = codec.encode_score_request(request)
    assert message.sequences[0].token_ids == strided.astype("<i4").tobytes()
