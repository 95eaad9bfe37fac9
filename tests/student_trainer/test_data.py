"""Data files: every format, the split, and one line with file and row for everything that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.scores import Message
from student_trainer.config import Data
from student_trainer.data import Example, load_examples, read_examples
from student_trainer.errors import UserError

ROWS = [{"instruction": f"add {i}", "input": f"{i} + 1", "output": str(i + 1)} for i in range(20)]


def save(path: Path, rows: Any) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(r) for r in rows) + "\n\n")
    else:
        path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_every_format_gives_the_same_examples(tmp_path: Path, name: str) -> None:
    examples = read_examples(save(tmp_path / name, ROWS))
    assert examples == read_examples(save(tmp_path / "other.json", ROWS))
    assert examples[3].messages == (Message("user", "add 3\n3 + 1"),)
    assert examples[3].expected == "4"


def test_json_lines_are_known_by_their_content(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("\ufeff" + "\n".join(json.dumps(r) for r in ROWS), encoding="utf-8")
    assert len(read_examples(path)) == 20


@pytest.mark.parametrize(
    ("row", "content", "expected"),
    [
        ({"instruction": "a", "input": "", "output": "c"}, "a", "c"),
        ({"instruction": "a", "input": None, "output": "c"}, "a", "c"),
        ({"instruction": "a"}, "a", None),
        ({"input": "b", "output": ""}, "b", ""),
        ({"instruction": "a", "input": "b", "output": "c", "id": 7, "extra": []}, "a\nb", "c"),
    ],
)
def test_instruction_and_input_make_one_turn(tmp_path: Path, row: Any, content: str, expected: str | None) -> None:
    (example,) = read_examples(save(tmp_path / "a.json", [row]))
    assert (example.messages, example.expected) == ((Message("user", content),), expected)


@pytest.mark.parametrize("name", ["a.json", "a.parquet"])
def test_of_a_chat_the_last_assistant_turn_is_expected(tmp_path: Path, name: str) -> None:
    turns = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v"), ("assistant", "b")]
    rows = [
        {"messages": [{"role": r, "content": c} for r, c in turns]},
        {"messages": [{"role": "user", "content": "q"}]},
    ]
    first, second = read_examples(save(tmp_path / name, rows))
    assert first.messages == tuple(Message(r, c) for r, c in turns[:-1])
    assert first.expected == "b"
    assert second.expected is None


def test_a_system_prompt_is_put_before_conversations_that_have_none(tmp_path: Path) -> None:
    own = {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "u"}]}
    first, second = read_examples(save(tmp_path / "a.json", [ROWS[0], own]), Data(system_prompt="be brief"))
    assert first.messages[0] == Message("system", "be brief")
    assert [m.content for m in second.messages] == ["own", "u"]


def test_ids_are_stable_and_depend_on_prompt_and_expectation(tmp_path: Path) -> None:
    rows = [ROWS[0], ROWS[1], ROWS[0] | {"output": "other"}]
    ids = [e.id for e in read_examples(save(tmp_path / "a.json", rows))]
    assert ids == [e.id for e in read_examples(save(tmp_path / "b.jsonl", rows))]
    assert len(set(ids)) == 3
    assert ids[0] == "1e37933e635f5615"


def test_repeated_and_blank_rows_are_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "a.json", [ROWS[0], ROWS[0], {"instruction": " ", "output": "x"}])
    assert len(read_examples(path)) == 1
    assert "3 rows, left out 1 blank and 1 repeated ones" in caplog.text


@given(st.integers(0, 25), st.floats(0, 0.99), st.integers(0, 99))
def test_the_split_is_a_partition_of_about_the_ratio(count: int, ratio: float, seed: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        rows = [ROWS[0] | {"instruction": str(i)} for i in range(count + 1)]
        data = Data(data_path=str(save(Path(folder) / "a.json", rows)), val_ratio=ratio)
        train, validation = load_examples(data, seed)
        assert (train, validation) == load_examples(data, seed)
    assert {e.id for e in train}.isdisjoint(e.id for e in validation)
    assert len(train) + len(validation) == count + 1
    assert train
    assert abs(len(validation) - ratio * (count + 1)) <= 1
    assert bool(validation) == (ratio > 0 and count >= 1)


def test_another_seed_splits_otherwise_and_order_does_not_matter(tmp_path: Path) -> None:
    one = Data(data_path=str(save(tmp_path / "a.json", ROWS)))
    two = Data(data_path=str(save(tmp_path / "b.json", ROWS[::-1])))
    assert load_examples(one, 1)[1] != load_examples(one, 2)[1]
    assert {e.id for e in load_examples(one, 1)[1]} == {e.id for e in load_examples(two, 1)[1]}


def test_a_validation_file_is_used_whole_and_kept_out_of_training(tmp_path: Path) -> None:
    train, validation = str(save(tmp_path / "a.json", ROWS)), str(save(tmp_path / "v.json", ROWS[:3]))
    got = load_examples(Data(data_path=train, val_path=validation), 0)
    assert [len(part) for part in got] == [17, 3]
    with pytest.raises(UserError, match="every example is in the validation file too"):
        load_examples(Data(data_path=validation, val_path=train), 0)


def test_max_examples_takes_the_first(tmp_path: Path) -> None:
    data = Data(data_path=str(save(tmp_path / "a.json", ROWS)), max_examples=5, val_ratio=0)
    train, validation = load_examples(data, 0)
    assert [e.expected for e in train] == ["1", "2", "3", "4", "5"]
    assert validation == []


WRONG: list[tuple[str, str, str]] = [
    ("a.json", "", "the file is empty"),
    ("a.json", " \n ", "the file is empty"),
    ("a.json", "[]", "no rows"),
    ("a.json", '[{"instruction": ""}]', "no usable rows: all 1 are blank"),
    ("a.json", "[{]", "not valid JSON at line 1, column 3"),
    ("a.json", "hello", "a.json, line 1: not valid JSON at column 1"),
    ("a.jsonl", '{"instruction": "a"}\n{"instr', "a.jsonl, line 2: not valid JSON"),
    ("a.json", '[{"instruction": "a"}, 5]', "a.json, row 2: int, not an object"),
    (
        "a.json",
        '[{"ask": "a", "answer": "b"}]',
        r"row 1: no instruction, messages, conversations or prompt among its keys \['answer', 'ask'\]; "
        r"name the right key in data\.prompt_column",
    ),
    ("a.json", '[{"instruction": 5}]', "row 1: instruction is a number, not text"),
    ("a.json", '[{"instruction": "a", "output": ["b"]}]', "row 1: output is a list, not text"),
    ("a.json", '[{"messages": []}]', "row 1: messages is empty, not a list of turns"),
    ("a.json", '[{"messages": "hi"}]', "row 1: messages is text, not a list of turns"),
    ("a.json", '[{"messages": [{"role": "user"}]}]', "row 1: turn 1 of messages has no text content"),
    ("a.json", '[{"messages": [{"role": "bot", "content": "x"}]}]', "with a role of system, user, assistant, tool"),
    ("a.json", '[{"messages": [{"role": "assistant", "content": "x"}]}]', "an answer and no question"),
    ("a.parquet", "PAR1 not", "not a readable Parquet file"),
]


@pytest.mark.parametrize(("name", "text", "wrong"), WRONG)
def test_what_is_wrong_with_a_file_is_told_in_one_line(tmp_path: Path, name: str, text: str, wrong: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=wrong) as caught:
        read_examples(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_files_folders_and_other_encodings_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.json: no such file; check data\.data_path"):
        read_examples(tmp_path / "nowhere.json")
    with pytest.raises(UserError, match=r"a folder without data: no file in it ends with \.json"):
        read_examples(tmp_path)
    (tmp_path / "l.json").write_bytes('[{"instruction": "é"}]'.encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8 at byte 18; save it as UTF-8"):
        read_examples(tmp_path / "l.json")


def test_an_example_may_lack_an_expectation() -> None:
    assert Example("i", ()).expected is None
