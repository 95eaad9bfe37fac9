"""reasoning-gym as a source: the same problems again, no overlap, and its own scorers as the verifier."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

import pytest

from student_trainer.config import Data
from student_trainer.data import load_examples, read_examples
from student_trainer.data.metadata import dump, load
from student_trainer.errors import UserError
from student_trainer.verifiers import load_verifier
from student_trainer.verifiers.tasks import EVALUATED, harmless_formula, harmless_list

pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra reasoning-gym)")

SOURCE = "reasoning-gym:chain_sum,gcd?size=20&seed=7&chain_sum.max_terms=3"


def judged(source: str, answer: str | None = None, name: str = "reasoning_gym") -> list[bool]:
    verifier = load_verifier(name)
    assert verifier is not None
    return [bool(verifier(answer or e.expected or "", e)) for e in read_examples(source)]


def test_tasks_take_turns_and_carry_what_their_scorers_need() -> None:
    found = read_examples(SOURCE)
    assert [e.domain for e in found[:4]] == ["chain_sum", "gcd", "chain_sum", "gcd"]
    first = found[0]
    assert first.metadata is not None
    assert first.metadata["task"] == first.metadata["metadata"]["source_dataset"] == "chain_sum"
    assert first.metadata["options"] == {"seed": 7, "max_terms": 3}
    assert all(e.messages[-1].content.count("+") < 3 for e in found if e.domain == "chain_sum")


def test_problems_depend_on_task_options_size_and_seed_alone() -> None:
    assert read_examples(SOURCE) == read_examples(SOURCE)
    alone = read_examples("reasoning-gym:gcd?size=20&seed=7")
    assert alone == [e for e in read_examples(SOURCE) if e.domain == "gcd"]
    assert {e.id for e in alone} != {e.id for e in read_examples("reasoning-gym:gcd?size=20&seed=1007")}


def test_no_question_is_in_both_parts_or_twice() -> None:
    data = Data(data_path="reasoning-gym:gcd?size=400&gcd.max_value=40", val_ratio=0.3)
    train, validation = load_examples(data, 1)
    questions = [e.messages[-1].content for e in [*train, *validation]]
    assert len(set(questions)) == len(questions) < 400
    assert validation
    other = data.model_copy(update={"val_path": "reasoning-gym:gcd?size=100&gcd.max_value=40&seed=350"})
    train, validation = load_examples(other, 1)
    assert {e.messages for e in train}.isdisjoint(e.messages for e in validation)


def test_the_packages_scorer_judges() -> None:
    assert all(judged(SOURCE))
    assert not any(judged(SOURCE, "no idea"))
    assert all(judged("reasoning-gym:gcd?size=5", None))


def test_an_answer_may_stand_in_tags_after_the_think_block() -> None:
    (example,) = read_examples("reasoning-gym:gcd?size=1")
    verifier = load_verifier("reasoning_gym")
    assert verifier is not None
    right = example.expected
    assert verifier(f"<think>1</think>So: <answer>\n{right}\n</answer>", example)
    assert not verifier(f"<think><answer>{right}</answer>", example)
    assert not verifier(f"The answer is {right}", example), "this scorer gives a part for it"
    partial = load_verifier("reasoning_gym?threshold=0.01")
    assert partial is not None
    assert partial(f"The answer is {right}", example)


def test_metadata_survives_as_text_with_tuples_sets_and_keys_that_are_numbers() -> None:
    values = {"a": (1, (2, [3, None])), "b": {1: "x", (1, 2): {4}}, "c": 0.5, "d": True, "__kind__": "own", "e": {}}
    again = load(dump(values))
    assert again == values
    assert repr(again) == repr(values)
    assert load(dump(None)) is None
    with pytest.raises(TypeError, match="bytes has no form in JSON"):
        dump({"a": b"x"})


@pytest.mark.parametrize(
    "task", ["knights_knaves", "sudoku", "shortest_path", "graph_color", "zebra_puzzles", "word_ladder"]
)
def test_a_scorer_gives_the_same_after_metadata_was_kept_as_text(task: str) -> None:
    import reasoning_gym

    entries = reasoning_gym.create_dataset(task, size=3, seed=3)
    for example, entry in zip(read_examples(f"reasoning-gym:{task}?size=3&seed=3"), entries, strict=True):
        kept = load(dump(example.metadata))
        assert kept == example.metadata
        again = {**entry, "metadata": kept["metadata"] if kept else None}
        assert entries.score_answer(entry["answer"], again) == entries.score_answer(entry["answer"], entry)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_every_task_gives_problems_whose_own_answers_are_right() -> None:
    from reasoning_gym.factory import DATASETS

    verifier = load_verifier("reasoning_gym")
    assert verifier is not None
    wrong = []
    for task in sorted(set(DATASETS) - {"composite"}):
        for example in read_examples(f"reasoning-gym:{task}?size=2&seed=1"):
            kept = load(dump(example.metadata))
            assert kept == example.metadata, task
            if example.expected is not None and not verifier(example.expected, example):
                wrong.append(task)
    assert not wrong


def test_every_scorer_that_evaluates_an_answer_is_known() -> None:
    from reasoning_gym.factory import DATASETS

    calls = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\(\s*(?:answer|user|response)")
    found = {
        name for name, (kind, _) in DATASETS.items() if calls.search(inspect.getsource(sys.modules[kind.__module__]))
    }
    assert found == set(EVALUATED)


@pytest.mark.parametrize(
    ("answer", "harmless"),
    [
        ("[[1, 0], [0, 1]]", True),
        ("['a', 'b']", True),
        ("1 2 3", True),
        ("__import__('os').system('touch /tmp/x')", False),
        ("[9**9**9]", False),
        ("f'{x}'", False),
        ("[1]" * 400, False),
    ],
)
def test_what_is_evaluated_as_a_list_can_do_nothing_else(answer: str, harmless: bool) -> None:
    assert harmless_list(answer) is harmless


@pytest.mark.parametrize(
    ("answer", "harmless"),
    [
        ("(8 - 4) * (7 - 1)", True),
        ("x**2*sin(x) - 3*exp(2*x)/7 + C", True),
        ("12*x**4 + 3*x*y**2", True),
        ("__import__('os')", False),
        ("x.func", False),
        ("open(1)", False),
        ("9**9**9", False),
        ("2**(9**9)", False),
        ("2**99999", False),
        ("lambda: 1", False),
        ("1" * 501, False),
    ],
)
def test_what_is_evaluated_as_a_formula_can_do_nothing_else(answer: str, harmless: bool) -> None:
    assert harmless_formula(answer) is harmless


def test_what_a_model_writes_is_not_run(tmp_path: Any) -> None:
    target = tmp_path / "written"
    attack = f"open('{target}', 'w')"
    for task in EVALUATED:
        assert judged(f"reasoning-gym:{task}?size=1", attack) == [False]
    assert not target.exists()


def test_what_a_scorer_cannot_read_is_wrong() -> None:
    assert judged("reasoning-gym:prime_factorization?size=2", "no idea") == [False, False]


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("reasoning-gym:chain_sums", "reasoning-gym has no task chain_sums; did you mean chain_sum"),
        ("reasoning-gym:", "reasoning-gym has no task without a name; it has ab, acre"),
        ("reasoning-gym:gcd?size=0", "size is 0, not a whole number from 1 on"),
        ("reasoning-gym:gcd?seed=x", "seed is x, not a whole number from 0 on"),
        (
            "reasoning-gym:gcd?max_value=5",
            "max_value is neither size, seed nor an option of one of its tasks; write gcd.",
        ),
        ("reasoning-gym:gcd?gcd.huge=5", r"reasoning-gym refuses gcd with .*'huge': 5"),
        ("reasoning-gym:gcd?gcd.min_value=0", "reasoning-gym refuses gcd with"),
    ],
)
def test_what_is_wrong_with_a_source_of_tasks_is_told(source: str, wrong: str) -> None:
    with pytest.raises(UserError, match=wrong) as caught:
        read_examples(source)
    assert "\n" not in str(caught.value)


def test_other_examples_cannot_be_judged_by_it(tmp_path: Any) -> None:
    (tmp_path / "a.json").write_text('[{"prompt": "q", "answer": "a"}]')
    with pytest.raises(
        UserError, match="the example has no task of reasoning-gym; use it with data_path=reasoning-gym"
    ):
        judged(str(tmp_path / "a.json"), "a")
