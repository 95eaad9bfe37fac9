"""Rejection sampling: what is kept, what a dataset remembers, and a stage that trains on right responses alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from protos.scores import Message, Mode
from student_trainer.config import Config, NonPolicyDistillation
from student_trainer.errors import UserError
from student_trainer.rejection import accepted, chosen, judged, mark, remembered, summary, verifier_of
from student_trainer.responses import Origin, Response, read
from student_trainer.responses import _table as table_of
from student_trainer.responses import _write_part as write_part
from student_trainer.run import run
from student_trainer.verifiers import final_answer
from tests.servers import ROOT
from tests.student_trainer.conftest import STUDENT

ORIGIN = Origin("f", "teacher", "t", "{}")
METADATA = {"task": "x", "pairs": ((1, 2),)}


def response(example: str, sample: int, text: str, tokens: int = 3, mode: Mode = Mode.NON_THINKING) -> Response:
    return Response(
        example_id=example,
        messages=(Message("user", "6*7"),),
        mode=mode,
        prompt_ids=np.arange(4, dtype=np.int32),
        expected="42",
        metadata=METADATA,
        sample=sample,
        completion_ids=np.zeros(tokens, np.int32),
        text=text,
        teacher="f",
    )


RESPONSES = [
    response("a", 0, "41"),
    response("a", 1, "42", tokens=9),
    response("a", 2, "42", tokens=5),
    response("a", 0, "<think>x</think>42", mode=Mode.THINKING),
    response("b", 0, "1"),
    response("b", 1, "2"),
    response("c", 0, "42"),
]


def options(**values: Any) -> NonPolicyDistillation:
    return NonPolicyDistillation(**values)


def config(**values: Any) -> Config:
    return Config.model_validate({"non_policy_distillation": values, "evaluation": {"verifier": "final_answer"}})


@pytest.mark.parametrize(
    ("keep", "cap", "kept"),
    [
        ("all", None, "a0 a1 a2 A0 b0 b1 c0"),
        ("all", 1, "a0 A0 b0 c0"),
        ("verified", None, "a1 a2 A0 c0"),
        ("verified", 1, "a1 A0 c0"),
        ("shortest_verified", None, "a2 A0 c0"),
        ("shortest_verified", 2, "a1 a2 A0 c0"),
    ],
)
def test_right_responses_are_kept_up_to_a_number_for_each_prompt_and_mode(
    keep: str, cap: int | None, kept: str
) -> None:
    found = chosen(judged(RESPONSES, final_answer), options(keep=keep, keep_per_prompt=cap))
    names = [(r.example_id.upper() if r.mode is Mode.THINKING else r.example_id) + str(r.sample) for r in found]
    assert " ".join(names) == kept


def test_counts_by_mode_are_told() -> None:
    found = judged(RESPONSES, final_answer)
    lines = summary(found, chosen(found, options(keep="shortest_verified")))
    assert lines == [
        "thinking: 1 of 1 responses are trained on; 1 are right (100%), 0 of 1 prompts have no right one",
        "non_thinking: 2 of 6 responses are trained on; 3 are right (50%), 1 of 3 prompts have no right one",
    ]


def test_a_number_of_one_and_more_is_right() -> None:
    verdicts = [r.verified for r in judged(RESPONSES[:3], lambda text, example: 1.0 if text == "42" else 0.9)]
    assert verdicts == [False, True, True]


def test_a_dataset_keeps_every_response_and_remembers_what_was_said(tmp_path: Path) -> None:
    folder = tmp_path / "responses.parquet"
    for part in (RESPONSES[:4], RESPONSES[4:]):
        write_part(folder, table_of(part, ORIGIN))
    before, _ = read(folder)
    assert [r.verified for r in before] == [None] * 7
    kept = accepted(config(keep="verified"), before, before[:6], folder, ours=True)
    after, origins = read(folder)
    assert [r.verified for r in after] == [False, True, True, True, False, False, True]
    assert [r.sample for r in kept] == [1, 2, 0]
    assert list(origins.values()) == [ORIGIN]
    assert [r.text for r in after] == [r.text for r in before]
    assert all(r.metadata == METADATA for r in after), "what a verifier needs survives, tuples too"
    assert pq.read_schema(folder / "part-00000.parquet").metadata[b"strong2weak.verifier"] == b"final_answer"
    assert pq.read_table(folder).num_rows == 7, "the parts are one table"
    times = [path.stat().st_mtime_ns for path in sorted(folder.glob("part-*"))]
    assert [r.verified for r in remembered(config(keep="verified"), after, folder)] == [r.verified for r in after]
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("part-*"))] == times, "nothing new is not written"


def test_the_dataset_of_somebody_else_is_not_written_to(tmp_path: Path) -> None:
    write_part(tmp_path / "r", table_of(RESPONSES, ORIGIN))
    whole = (tmp_path / "r" / "part-00000.parquet").read_bytes()
    found, _ = read(tmp_path / "r")
    assert len(accepted(config(keep="verified"), found, found, tmp_path / "r", ours=False)) == 4
    assert (tmp_path / "r" / "part-00000.parquet").read_bytes() == whole


def test_parts_of_before_there_were_verdicts_get_the_column(tmp_path: Path) -> None:
    write_part(tmp_path, table_of(RESPONSES, ORIGIN))
    path = tmp_path / "part-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["verified", "metadata"]), path)
    assert [r.metadata for r in read(tmp_path)[0]] == [None] * 7
    mark(tmp_path, {("a", Mode.NON_THINKING, 1): True}, "mine")
    assert [r.verified for r in read(tmp_path)[0]] == [None, True, None, None, None, None, None]


def test_where_nothing_is_right_the_run_ends_with_a_line(tmp_path: Path) -> None:
    wrong = [response("a", i, "1") for i in range(3)]
    with pytest.raises(UserError, match=r"keep: the verifier finds none of 3 responses right: .*; read some of them"):
        accepted(config(keep="verified"), wrong, wrong, tmp_path, ours=False)


def test_keeping_what_is_right_needs_a_verifier() -> None:
    assert verifier_of(Config()) is None
    with pytest.raises(UserError, match="keep: verified needs a verifier, and none is named; set non_policy_distil"):
        verifier_of(Config(non_policy_distillation=options(keep="verified")))
    with pytest.raises(UserError, match=r"non_policy_distillation\.verifier=nothing: not a verifier"):
        verifier_of(config(keep="verified", verifier="nothing"))
    found = verifier_of(config(keep="verified", verifier="number?tolerance=0.1"))
    assert found is not None
    assert found[0] == "number?tolerance=0.1"


@pytest.fixture
def settings(tmp_path: Path, pair_teacher: dict[str, Any]) -> Callable[..., Config]:
    def make(data: dict[str, Any], **stage: Any) -> Config:
        return Config.model_validate(
            {
                "models": {"student_model": str(STUDENT), "torch_dtype": "float32", "load_in_4bit": False},
                "data": {"max_length": 200, **data},
                "training": {
                    "output_dir": str(tmp_path / "outputs"),
                    "log_file": str(tmp_path / "log"),
                    "use_tensorboard": False,
                },
                "non_policy_distillation": {
                    "max_new_tokens": 24,
                    "response_temperature": 1.0,
                    "batch_size": 4,
                    "gradient_accumulation_steps": 1,
                    "max_steps": 1,
                    "top_k": 8,
                    "alpha": 0.0,
                    "beta": 1.0,
                    **stage,
                },
                "evaluation": {"verifier": "final_answer", "problems": 2, "max_new_tokens": 8, "show": 0},
                "teacher": {"endpoint": pair_teacher["grpc"]},
            }
        )

    return make


def test_stage_1_samples_several_times_and_trains_on_right_responses(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    data = {"data_path": str(ROOT / "dataset" / "arithmetic.json"), "max_examples": 10, "val_ratio": 0.2}
    made = settings(data, keep="verified", samples_per_prompt=3)
    run(made, "non_policy", None, Console(file=io.StringIO(), width=200))
    found, _ = read(tmp_path / "outputs" / "non_policy_distillation" / "responses.parquet")
    assert len(found) == 8 * 2 * 3
    right = {(r.example_id, r.mode, r.sample) for r in found if r.verified}
    assert 0 < len(right) < len(found)
    assert right == {(r.example_id, r.mode, r.sample) for r in judged(found, final_answer) if r.verified}
    text = (tmp_path / "log").read_text()
    assert f"{len(right)} responses of the teacher" in text
    assert "responses are trained on; " in text


def test_problems_of_reasoning_gym_are_asked_kept_and_judged_by_their_scorers(
    settings: Callable[..., Config], tmp_path: Path
) -> None:
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed (extra reasoning-gym)")
    source = "reasoning-gym:chain_sum?size=6&chain_sum.max_terms=2&chain_sum.max_digits=1"
    made = settings({"data_path": source, "val_ratio": 0.2}, keep="all", modes="non_thinking")
    run(made, "non_policy", None, Console(file=io.StringIO(), width=200))
    path = tmp_path / "outputs" / "non_policy_distillation" / "responses.parquet"
    found, _ = read(path)
    assert {r.domain for r in found} == {"chain_sum"}
    judging = settings({"data_path": source}, keep="verified", verifier="reasoning_gym")
    scored = remembered(judging, found, path)
    assert all(r.verified is not None for r in scored)
