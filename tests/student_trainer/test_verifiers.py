"""Verifiers: what counts as a right answer, and how one's own is named."""

import threading
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
        ("exact", "not a verifier; use one of final_answer, contains, .*, or module:function"),
        ("no_such_module_here:f", "cannot import no_such_module_here"),
        ("json:nothing", "json has no function nothing"),
        (":f", "not a verifier"),
    ],
)
def test_a_verifier_that_cannot_be_found_is_told(name: str, wrong: str) -> None:
    with pytest.raises(UserError, match=f"evaluation.verifier={name}: {wrong}"):
        load_verifier(name)


def right(name: str, text: str, expected: str | None) -> bool:
    verifier = load_verifier(name)
    assert verifier is not None
    return bool(verifier(text, Example("i", (), expected)))


@pytest.mark.parametrize(
    ("text", "expected", "yes"),
    [
        ("<think>no</think>It is Paris.", "paris", True),
        ("It is New\n York", "new york", True),
        ("42", "4", False),
        ("it is 4.", "4", True),
        ("<think>4</think>5", "4", False),
        ("anything", "", False),
        ("a+b", "a+b", True),
    ],
)
def test_contains_looks_for_whole_words_of_the_answer(text: str, expected: str, yes: bool) -> None:
    assert right("contains", text, expected) is yes


@pytest.mark.parametrize(
    ("text", "expected", "yes"),
    [
        ("3 apples and 4 make 7.", "7", True),
        ("The cost is $1,234.50", "1234.5", True),
        ("<think>8</think> 7", "8", False),
        ("x = -5", "-5", True),
        ("x = −5", "-5", True),
        ("10-5", "5", True),
        ("it is 3/4", "0.75", True),
        ("it is 3/0", "0.75", False),
        ("12 of them", "48 + 24 = 72\n#### 12", True),
        ("in the year 1,2345", "12345", False),
        (r"\boxed{72} since 3", "72", True),
        ("1e3", "1000", True),
        (".5", "0.5", True),
        ("v2", "2", True),
        ("none", "5", False),
        ("5", "none", False),
        ("0.3333333", "1/3", True),
        ("0.333", "1/3", False),
    ],
)
def test_number_compares_the_last_numbers(text: str, expected: str, yes: bool) -> None:
    assert right("number", text, expected) is yes


def test_the_tolerance_of_numbers_is_an_option() -> None:
    assert right("number?tolerance=0.01", "0.333", "1/3")
    assert not right("number?tolerance=0.0001", "0.333", "1/3")


@pytest.mark.parametrize(
    ("text", "expected", "yes"),
    [
        (r"so \boxed{42}", "42", True),
        (r"first \boxed{1}, then \boxed{42}.", r"long, \boxed{42}", True),
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", True),
        (r"\boxed{\frac12}", "0.5", True),
        (r"\boxed{\left( 1, 2 \right)}", "(1,2)", True),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}", True),
        (r"\boxed{\text{Monday}}", "Monday", True),
        (r"\boxed{1{,}000}", "1000", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{90^\circ}", "90", True),
        (r"\boxed{x^2}", "x^3", False),
        ("42", "42", False),
        (r"<think>\boxed{42}</think> done", "42", False),
        (r"\boxed{42", "42", False),
    ],
)
def test_boxed_compares_the_last_box(text: str, expected: str, yes: bool) -> None:
    assert right("boxed", text, expected) is yes


@pytest.mark.parametrize(
    ("text", "expected", "yes"),
    [
        ("the answer is $\\frac{1}{2}$", "0.5", True),
        (r"\boxed{x + 1}", "1+x", True),
        (r"\boxed{2(x+1)}", "2x+2", True),
        (r"\boxed{\text{B}}", "B", True),
        ("it is 72", "48+24=72\n#### 72", True),
        (r"\boxed{x + 2}", "1+x", False),
        ("", "1", False),
        ("1", "", False),
    ],
)
def test_math_compares_what_expressions_mean(text: str, expected: str, yes: bool) -> None:
    assert right("math", text, expected) is yes


def test_math_works_outside_of_the_main_thread_too() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(right("math", r"\boxed{1+x}", "x+1")))
    thread.start()
    thread.join()
    assert found == [True]


@pytest.mark.parametrize(
    ("text", "expected", "yes"),
    [
        ('{"b": [1, 2], "a": null}', '{"a": null, "b": [1.0, 2]}', True),
        ('Here:\n```json\n{"a": 1}\n```\nDone.', '{"a": 1}', True),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": "1"}', '{"a": 1}', False),
        ('{"a": 12345678901234567}', '{"a": 12345678901234568}', False),
        ('{"a": NaN}', '{"a": NaN}', False),
        ('{"a": 1', '{"a": 1', False),
    ],
)
def test_json_compares_values(text: str, expected: str, yes: bool) -> None:
    assert right("json", text, expected) is yes


@pytest.mark.parametrize("name", ["contains", "number", "boxed", "math", "json"])
def test_without_an_expectation_or_an_end_of_thinking_none_of_them_is_right(name: str) -> None:
    assert not right(name, r"\boxed{42}", None)
    assert not right(name, r"<think>\boxed{42}", "42")


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("number?tol=1", "number has no option tol; it has tolerance"),
        ("final_answer?x=1", "final_answer has no option x; it has none"),
        ("number?tolerance=much", "tolerance is 'much', not a number; write tolerance=1e-06"),
        ("number?tolerance", "tolerance is no option; write name"),
        ("number?tolerance=1&tolerance=2", "tolerance is given twice"),
    ],
)
def test_options_of_a_verifier_are_checked(name: str, wrong: str) -> None:
    with pytest.raises(UserError, match=wrong):
        load_verifier(name)


def test_a_verifier_of_ones_own_takes_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_lengths.py").write_text("def short(text, example, *, most=3):\n    return len(text) <= most\n")
    monkeypatch.chdir(tmp_path)
    assert not right("my_lengths:short", "abcd", None)
    assert right("my_lengths:short?most=4", "abcd", None)
