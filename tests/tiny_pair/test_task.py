"""The task: its answers, its split and its verifier."""

import random
from collections import Counter

import pytest

from tiny_pair.task import (
    HELD_OUT_ONE_IN,
    OPERANDS_SHARES,
    Problem,
    distinct_problems,
    draw_problem,
    final_answer,
    is_right,
    problems,
    user_content,
)


def test_a_problem_reads_and_answers_as_documented() -> None:
    problem = Problem(37, (58, -24))
    assert problem.expression == "37+58-24"
    assert problem.thinking == "37+58=95\n95-24=71"
    assert problem.answer == "71"


def test_every_step_is_true_and_the_last_one_ends_in_the_answer() -> None:
    rng = random.Random(0)
    for _ in range(500):
        problem = draw_problem(rng)
        steps = [line.split("=") for line in problem.thinking.split("\n")]
        # The expressions hold digits and signs alone: Python's own arithmetic is the reference.
        assert all(eval(left) == int(right) >= 0 for left, right in steps)
        assert str(eval(problem.expression)) == problem.answer == steps[-1][1]


def test_the_same_seed_gives_the_same_problems_and_another_seed_others() -> None:
    first, again, other = (distinct_problems(50, seed, held_out=False) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_no_training_problem_is_held_out_even_with_its_terms_exchanged() -> None:
    training = distinct_problems(5000, 0, held_out=False)
    held_out = distinct_problems(1000, 0, held_out=True)

    def terms(problem: Problem) -> tuple[int, ...]:
        return tuple(sorted((problem.first, *problem.rest)))

    assert not {terms(p) for p in training} & {terms(p) for p in held_out}


def test_about_one_problem_in_sixteen_is_held_out() -> None:
    rng = random.Random(1)
    share = sum(draw_problem(rng).held_out for _ in range(8000)) / 8000
    assert share == pytest.approx(1 / HELD_OUT_ONE_IN, abs=0.015)


def test_difficulties_are_mixed_as_the_shares_say() -> None:
    stream = problems(2, held_out=False)
    counts = Counter(next(stream).operands for _ in range(5000))
    for operands, share in OPERANDS_SHARES.items():
        assert counts[operands] / 5000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("71", "71"),
        (" 71\n", "71"),
        ("<think>\n37+58=95\n95-24=71\n</think>\n\n71", "71"),
        ("<think>\n\n</think>\n\n71", "71"),
        ("<think>\n37+58=95\n95-24=71", ""),
        ("", ""),
    ],
)
def test_the_final_answer_is_what_follows_the_think_block(completion: str, answer: str) -> None:
    assert final_answer(completion) == answer


def test_an_answer_is_right_only_if_it_is_the_whole_answer() -> None:
    assert is_right("71", "71")
    assert not is_right("171", "71")
    assert not is_right("71 or 72", "71")
    assert not is_right("<think>\n71", "71")


def test_the_users_turn_joins_instruction_and_input_with_a_line_break() -> None:
    assert user_content("Calculate", "37+58") == "Calculate\n37+58"
    assert user_content("Hello", "") == "Hello"
