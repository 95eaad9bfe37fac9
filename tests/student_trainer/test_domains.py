"""The domain column: read from every format, measured by itself where there are several."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.scores import Mode
from student_trainer.config import Data
from student_trainer.data import load_examples, read_examples
from student_trainer.errors import UserError
from student_trainer.evaluation import accuracy, by_name
from student_trainer.responses import Request
from tests.student_trainer.test_data import save

ROWS: list[dict[str, Any]] = [
    {"instruction": "1+1", "output": "2", "messages": None, "domain": "math"},
    {"instruction": "print", "output": "print()", "messages": None, "domain": "code"},
    {"instruction": None, "output": None, "messages": [{"role": "user", "content": "hello"}], "domain": None},
    {"instruction": "2+2", "output": "4", "messages": None, "domain": " "},
]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.parquet"])
def test_every_format_and_shape_of_row_may_name_a_domain(tmp_path: Path, name: str) -> None:
    found = read_examples(save(tmp_path / name, ROWS))
    assert [e.domain for e in found] == ["math", "code", None, None]
    plain = read_examples(save(tmp_path / "plain.json", [{k: v for k, v in r.items() if k != "domain"} for r in ROWS]))
    assert [e.id for e in plain] == [e.id for e in found], "a domain does not change which example is which"


def test_the_column_is_named_by_the_configuration(tmp_path: Path) -> None:
    path = save(tmp_path / "a.json", [r | {"topic": f"t{i}"} for i, r in enumerate(ROWS)])
    data = Data(data_path=str(path), val_ratio=0.25, domain_column="topic")
    train, validation = load_examples(data, 0)
    assert {e.domain for e in [*train, *validation]} == {"t0", "t1", "t2", "t3"}


@pytest.mark.parametrize(("domain", "wrong"), [("thinking", "which is the name of a mode"), (3, "domain is a number")])
def test_a_domain_that_metrics_cannot_tell_apart_is_refused_with_its_row(
    tmp_path: Path, domain: Any, wrong: str
) -> None:
    path = save(tmp_path / "a.json", [ROWS[0], ROWS[1] | {"domain": domain}])
    with pytest.raises(UserError, match=wrong) as caught:
        read_examples(path)
    assert f"{path}, row 2" in str(caught.value)


def test_a_repeated_row_of_another_domain_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "a.json", [ROWS[0], ROWS[0] | {"domain": "code"}, ROWS[0]])
    assert [e.domain for e in read_examples(path)] == ["math"]
    assert "1 of the repeated rows name another domain; the first one counts" in caplog.text


def request(name: str, mode: Mode, domain: str | None) -> Request:
    return Request(name, (), mode, np.zeros(3, np.int32), "yes", domain)


def right(text: str, example: Any) -> bool:
    return bool(text == example.expected)


def test_accuracy_is_by_mode_and_where_there_are_several_by_domain() -> None:
    answers = [
        (request("a", Mode.THINKING, "math"), "yes", 4, True),
        (request("b", Mode.THINKING, "code"), "no", 8, False),
        (request("a", Mode.NON_THINKING, "math"), "yes", 2, True),
        (request("c", Mode.NON_THINKING, "math"), "no", 2, True),
        (request("d", Mode.NON_THINKING, None), "no", 6, True),
    ]
    found = accuracy(right, answers)
    assert found["accuracy_thinking"] == 0.5
    assert found["accuracy_non_thinking"] == pytest.approx(1 / 3)
    assert found["accuracy_math"] == pytest.approx(2 / 3)
    assert found["accuracy_code"] == 0
    assert found["finished_code"] == 0
    assert found["completion_tokens_math"] == pytest.approx(8 / 3)
    assert len([name for name in found if name.startswith("accuracy_")]) == 4
    alone = [a for a in answers if a[0].domain == "math"]
    assert {n for n in accuracy(right, alone) if "accuracy" in n} == {"accuracy_thinking", "accuracy_non_thinking"}
    assert not any("accuracy" in name for name in accuracy(None, answers))


def test_a_single_domain_has_no_metrics_of_its_own() -> None:
    parts = [(mode, "math") for mode in Mode]
    assert by_name(parts) == {"thinking": parts[:1], "non_thinking": parts[1:]}
    assert json.dumps(list(by_name([*parts, (Mode.THINKING, None)]))) == '["thinking", "non_thinking", "math"]'
