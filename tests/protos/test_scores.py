"""Domain types refuse what cannot be meant, and join what belongs together."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos import scores as domain
from tests.protos.strategies import same, scores


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: domain.Sequence([1]), "at least 2 tokens"),
        (lambda: domain.Sequence([1, 2], 2), "score_start must be from 1 to 1 for 2 tokens, got 2"),
        (lambda: domain.Sequence([1, 2], 0), "got 0"),
        (lambda: domain.Sequence([1.5, 2.0]), "whole numbers"),
        (lambda: domain.Sequence([1, 2**31]), "fit int32"),
        (lambda: domain.Sequence([[1, 2]]), "1 dimension"),
        (lambda: domain.Sequence([1, 2, 3], 1, [[1]]), "1 rows, 2 positions are scored"),
        (lambda: domain.ScoreSpec(-1), "top_k must be at least 0"),
        (lambda: domain.ScoreSpec(0, (1.0, float("inf"))), "finite and above 0, got inf"),
        (lambda: domain.ScoreSpec(want=frozenset({domain.Field.TOP})), "top_k is 0"),
        (lambda: domain.Prompt(), "exactly one of messages, token_ids and text, got 0"),
        (lambda: domain.Prompt(text="a", token_ids=[1]), "got 2"),
        (lambda: domain.Sampling(0), "max_tokens must be at least 1"),
        (lambda: domain.Sampling(1, temperature=-1), "temperature must be finite and at least 0"),
        (lambda: domain.Sampling(1, top_p=0), "top_p must be above 0"),
        (lambda: domain.Sampling(1, top_k=-1), "top_k and max_thinking_tokens"),
        (lambda: domain.GenerateRequest((), domain.Sampling(1), n=0), "n must be at least 1"),
        (lambda: domain.Scores(token_logprobs=np.zeros(2)), r"token_logprobs must be float32\[T\]"),
        (lambda: domain.Scores(log_normalizer=np.zeros(2, np.float32)), r"log_normalizer must be float32\[T,..\]"),
        (lambda: domain.Scores(top_logprobs=np.zeros((2, 1), np.float32)), "come together"),
        (lambda: domain.Scores(hidden_states=np.zeros((2, 1), np.float16)), r"hidden_states must be float32\[T,..\]"),
        (
            lambda: domain.Scores(token_logprobs=np.zeros(2, np.float32), log_normalizer=np.zeros((3, 1), np.float32)),
            r"different numbers of rows: \[2, 3\]",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_numbers(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make()


def test_empty_temperatures_mean_one_and_no_candidates_mean_none() -> None:
    assert domain.ScoreSpec(0, ()).temperatures == (1.0,)
    assert domain.Sequence([1, 2], 1, np.zeros((1, 0), np.int32)).candidate_ids is None


def test_fields_follow_from_the_arguments_unless_named() -> None:
    f = domain.Field
    assert domain.ScoreSpec().fields(0) == {f.TOKEN_LOGPROBS, f.LOG_NORMALIZER}
    assert domain.ScoreSpec(2).fields(3) == set(f) - {f.HIDDEN_STATES}
    assert domain.ScoreSpec(2, want=frozenset({f.TOP})).fields(3) == {f.TOP}


@given(scores(), st.data())
def test_rows_that_are_joined_again_are_the_whole(value: domain.Scores, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, value.positions))
    parts = [value.rows(0, cut), value.rows(cut, value.positions)]
    assert same(domain.Scores.join([p for p in parts if p.positions]), value)
    assert value.nbytes == sum(p.nbytes for p in parts)


def test_a_result_that_is_not_finite_is_told() -> None:
    assert domain.Scores(token_logprobs=np.zeros(2, np.float32)).finite()
    for bad in (np.nan, -np.inf):
        assert not domain.Scores(token_logprobs=np.array([0, bad], np.float32)).finite()
