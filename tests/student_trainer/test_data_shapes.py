"""Shapes of rows: what is asked and expected in each, which one a row is, and one line for each wrong one."""

from typing import Any

import pytest

from protos.scores import Message
from student_trainer.data.shapes import Format, conversation
from student_trainer.errors import UserError

AUTO = Format()
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "r"}]
CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def turns(row: Any, form: Format = AUTO) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in conversation("here", row, form).messages]


@pytest.mark.parametrize(
    ("row", "prompt", "expected"),
    [
        ({"conversations": [*SHAREGPT, {"from": "gpt", "value": "b"}]}, ["q", "a", "r"], "b"),
        ({"conversations": SHAREGPT}, ["q", "a", "r"], None),
        ({"conversation": CHAT}, ["q"], "a"),
        ({"conversations": SHAREGPT, "system": "s"}, ["s", "q", "a", "r"], None),
        (
            {"conversations": [{"from": "system", "value": "own"}, *SHAREGPT], "system": "s"},
            ["own", "q", "a", "r"],
            None,
        ),
        ({"prompt": "q"}, ["q"], None),
        ({"prompt": "q", "response": "a"}, ["q"], "a"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, ["q"], "a"),
        ({"question": "q", "answer": "a"}, ["q"], "a"),
        ({"question": "q", "answer": 42}, ["q"], "42"),
        ({"question": "q", "answer": 0.5}, ["q"], "0.5"),
        ({"problem": "q", "solution": "long", "answer": "a"}, ["q"], "a"),
        ({"system_prompt": "s", "question": "q", "response": "a"}, ["s", "q"], "a"),
        ({"text": "q"}, ["q"], None),
        ({"messages": CHAT, "prompt": "other"}, ["q"], "a"),
        ({"instruction": "q", "output": "a", "prompt": "other"}, ["q"], "a"),
        ({"messages": None, "conversations": None, "instruction": None, "prompt": "q"}, ["q"], None),
    ],
)
def test_a_row_is_known_by_its_keys(row: Any, prompt: list[str], expected: str | None) -> None:
    found = conversation("here", row, AUTO)
    assert [m.content for m in found.messages] == prompt
    assert found.expected == expected


def test_names_of_speakers_become_roles() -> None:
    names = ["system", "human", "gpt", "user", "assistant", "observation", "model", "human"]
    row = {"conversations": [{"from": name, "value": name} for name in names]}
    assert turns(row) == [
        ("system", "system"),
        ("user", "human"),
        ("assistant", "gpt"),
        ("user", "user"),
        ("assistant", "assistant"),
        ("tool", "observation"),
        ("assistant", "model"),
        ("user", "human"),
    ]


def test_a_format_that_is_named_wins_over_the_keys() -> None:
    row = {"instruction": "i", "messages": CHAT, "conversations": SHAREGPT, "prompt": "p"}
    found = {n: turns(row, Format(n))[0][1] for n in ("alpaca", "messages", "sharegpt", "prompts")}
    assert found == {"alpaca": "i", "messages": "q", "sharegpt": "q", "prompts": "p"}


def test_keys_of_ones_own_name_prompt_and_answer() -> None:
    row = {"ask": "q", "truth": 7, "prompt": "other", "messages": CHAT}
    found = conversation("here", row, Format("auto", "ask", "truth"))
    assert found.messages == (Message("user", "q"),)
    assert found.expected == "7"


@pytest.mark.parametrize(
    "row", [{"conversations": []}, {"conversations": [{"from": "gpt", "value": "a"}]}, {"text": " "}]
)
def test_a_row_in_which_nobody_asks_anything_is_blank(row: Any) -> None:
    assert conversation("here", row, AUTO).blank


@pytest.mark.parametrize(
    ("row", "form", "wrong"),
    [
        ({"conversations": "hi"}, AUTO, "conversations is text, not a list of turns; give from and value"),
        ({"conversations": ["hi"]}, AUTO, "turn 1 of conversations is text, not an object"),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            AUTO,
            "turn 1 .* with a from of system, user, .*, human, gpt",
        ),
        ({"conversations": [*SHAREGPT, {"from": "gpt"}]}, AUTO, "turn 4 of conversations has no text value"),
        ({"prompt": ["hi"]}, AUTO, "turn 1 of prompt has no text content"),
        ({"prompt": CHAT}, AUTO, "prompt ends with the assistant's turn"),
        ({"prompt": 5}, AUTO, "prompt is a number, not text"),
        ({"question": "q", "answer": {"a": 1}}, AUTO, "answer is an object, not text"),
        ({"question": "q", "answer": True}, AUTO, "answer is a truth value, not text"),
        ({"prompt": CHAT[:1], "completion": [CHAT[1], CHAT[1]]}, AUTO, "completion has 2 turns, not one"),
        ({"ask": "q"}, AUTO, r"no instruction, messages, conversations or prompt among its keys \['ask'\]"),
        (
            {"ask": "q"},
            Format("alpaca"),
            r"a row of format alpaca has instruction or input, this one has the keys \['ask'\]",
        ),
        ({"ask": "q"}, Format("messages"), "a row of format messages has messages"),
        ({"ask": "q"}, Format("sharegpt"), "a row of format sharegpt has conversations"),
        ({"ask": "q"}, Format("prompts"), "a row of format prompts has prompt or question or problem"),
        ({"ask": "q"}, Format("auto", "mine"), "a row of format prompts has mine, this one"),
        ("text", AUTO, "str, not an object"),
    ],
)
def test_what_is_wrong_with_a_row_is_told_in_one_line(row: Any, form: Format, wrong: str) -> None:
    with pytest.raises(UserError, match=f"file, row 3: {wrong}") as caught:
        conversation("file, row 3", row, form)
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)


def test_of_a_table_only_columns_that_are_read_are_taken() -> None:
    names = ["id", "question", "answer", "embedding", "tests"]
    assert AUTO.columns(names, {"tests"}) == ["question", "answer", "tests"]
    assert Format("auto", "id").columns(names, set()) == ["id", "question", "answer"]
    assert AUTO.columns(["ask", "answer"], set()) == ["ask", "answer"], "an error names all of them"
