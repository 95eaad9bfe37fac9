"""Verifiers: what counts as a right answer, and how one's own is named."""

from pathlib import Path

import pytest

from student_trainer.data import Example
from student_trainer.errors import UserError
from student_trainer.verifiers import final_answer, load_verifier


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("42", True),
        (" 42\n", True),
        ("<think>\n40+2\n</think>\n\n42", True),
        ("<think>\n\n</think>\n\n42", True),
        ("<think>42</think>41", False),
        ("<think>a</think>41</think>42", True),
        ("<think>42", False),
        ("<think>a</think><think>42", False),
        ("the answer is 42", False),
        ("", False),
        ("<think>42</think>", False),
    ],
)
def test_what_follows_the_think_block_is_compared(text: str, right: bool) -> None:
    assert final_answer(text, Example("i", (), "42")) is right


def test_white_space_within_an_answer_counts_as_one_space() -> None:
    assert final_answer("<think>x</think>\na  b\nc", Example("i", (), "a b c"))


def test_an_expectation_with_a_think_block_is_compared_by_its_answer() -> None:
    assert final_answer("42", Example("i", (), "<think>\nlong\n</think>\n\n42"))


def test_without_an_expectation_nothing_is_right() -> None:
    assert not final_answer("42", Example("i", (), None))


def test_verifiers_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_checks.py").write_text("def short(text, example):\n    return len(text) < 3\n")
    monkeypatch.chdir(tmp_path)
    assert load_verifier(None) is None
    assert load_verifier("final_answer") is final_answer
    own = load_verifier("my_own_checks:short")
    assert own is not None
    assert own("ab", Example("i", ()))
    assert not own("abc", Example("i", ()))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("exact", "not a verifier; use final_answer or module:function"),
        ("no_such_module_here:f", "cannot import no_such_module_here"),
        ("json:nothing", "json has no function nothing"),
        (":f", "not a verifier"),
    ],
)
def test_a_verifier_that_cannot_be_found_is_told(name: str, wrong: str) -> None:
    with pytest.raises(UserError, match=f"evaluation.verifier={name}: {wrong}"):
        load_verifier(name)
