"""`evaluate` and stage `test` as users run them, on the tiny pair."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from student_trainer.__main__ import main
from student_trainer.commands.evaluate import labels
from tests.servers import ROOT
from tests.student_trainer.conftest import STUDENT, TEACHER
from tests.tiny_qwen3 import make


@pytest.fixture
def given(pair_teacher: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [
        f"models.student_model={STUDENT}", "models.torch_dtype=float32", "data.max_length=96",
        f"data.data_path={ROOT / 'dataset' / 'arithmetic.json'}", "data.max_examples=400",
        f"teacher.endpoint={pair_teacher['grpc']}", "teacher.patience=0", "evaluation.verifier=final_answer",
        "evaluation.problems=8", "evaluation.max_new_tokens=48", "evaluation.show=1",
        "non_policy_distillation.max_new_tokens=48", "policy_distillation.max_new_tokens=48",
    ]  # fmt: skip


def test_models_are_compared_with_each_other_and_the_teacher(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "numbers" / "e.json"
    assert main(["evaluate", str(STUDENT), str(TEACHER), "--out", str(out), *given]) == 0
    found = json.loads(out.read_text())
    teacher, student, same = (model["values"] for model in found["models"])
    assert [m["model"] for m in found["models"]][1:] == ["student_base", "teacher"]
    # The teacher's own weights answer as the teacher does, and are at no distance from it.
    for name in ("accuracy_thinking", "accuracy_non_thinking", "completion_tokens_thinking"):
        assert same[name] == teacher[name]
    assert same["accuracy_thinking"] > student["accuracy_thinking"]
    for name in ("forward_kl_thinking", "reverse_kl_non_thinking", "forward_kl", "reverse_kl"):
        assert same[name] == pytest.approx(0, abs=1e-4)
        assert student[name] > 1
    assert {"tail_share", "cross_entropy", "finished_thinking"} <= student.keys()
    printed = capsys.readouterr().out
    assert "8 held-out problems in each mode, accuracy by final_answer; divergences in nats" in printed
    assert "forward KL non-thinking" in printed


def test_without_a_teacher_there_is_accuracy_alone_by_mode_and_domain(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data.json"
    rows = [
        {"instruction": f"Calculate\n{i}+{j}", "output": str(i + j), "domain": "even" if j % 2 == 0 else "odd"}
        for i in range(4)
        for j in range(4)
    ]
    data.write_text(json.dumps(rows))
    arguments = [*given, f"data.data_path={data}", "data.val_ratio=0.5", "teacher.endpoint=127.0.0.1:1"]
    assert main(["evaluate", "--no-teacher", str(STUDENT), "--out", "e.json", *arguments]) == 0
    (only,) = json.loads(Path("e.json").read_text())["models"]
    assert {"accuracy_thinking", "accuracy_even", "accuracy_odd"} <= only["values"].keys()
    assert not [name for name in only["values"] if "kl" in name]
    assert "divergences" not in capsys.readouterr().out


def test_a_checkpoint_brings_its_own_configuration_and_an_adapter_its_base(given: list[str], tmp_path: Path) -> None:
    few = ["non_policy_distillation.max_steps=1", "training.save_steps=1", "training.use_tensorboard=false",
           "evaluation.problems=2", "non_policy_distillation.max_new_tokens=24", "models.lora_rank=2",
           "evaluation.every_epochs=0", "data.max_examples=40"]  # fmt: skip
    assert main(["--stage", "non_policy", *given, *few]) == 0
    stage = tmp_path / "outputs" / "non_policy_distillation"
    assert not (stage / "checkpoint-1" / "model.safetensors").exists()
    folders = [str(stage / name) for name in ("checkpoint-1", "final_model", "final_model/adapter")]
    assert main(["evaluate", *folders, "--out", "e.json", "evaluation.show=0"]) == 0
    found = json.loads(Path("e.json").read_text())
    assert found["config"]["evaluation"]["problems"] == 2
    assert [m["model"] for m in found["models"]][1:] == ["checkpoint-1", "final_model", "adapter"]
    assert [m["step"] for m in found["models"]][1:3] == [1, 1]
    checkpoint, final, adapter = (m["values"]["forward_kl"] for m in found["models"][1:])
    assert checkpoint == pytest.approx(adapter, abs=1e-5)
    assert checkpoint == pytest.approx(final, abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "there is no folder nowhere; name a model folder or checkpoint"),
        ([str(STUDENT), "--no-teacher", "evaluation.verifier=null"], "neither a verifier nor a teacher"),
        ([str(STUDENT), "data.val_ratio=0"], "no problem is held out to measure on"),
        ([str(STUDENT), "other"], "its tokenizer has the hash"),
        ([str(STUDENT), "--out", "."], "--out: . is a folder; name a JSON file"),
        ([str(STUDENT), "evaluation.problem=3"], "did you mean evaluation.problems?"),
    ],
)
def test_mistakes_are_one_line(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    make(tmp_path / "other")
    folders = [a for a in arguments if "=" not in a]
    assert main(["evaluate", *folders, *given, *(a for a in arguments if "=" in a)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ") and says in line] == lines[-1:]


def test_names_are_as_long_as_they_must_be() -> None:
    assert labels([Path("/a/best"), Path("/b/last")]) == ["best", "last"]
    assert labels([Path("/a/x/best"), Path("/a/y/best")]) == ["x/best", "y/best"]


def test_stage_test_shows_both_models_the_score_and_an_answer_in_each_mode(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--stage", "test", *given]) == 0
    printed = capsys.readouterr().out
    titles = [line[3:].strip() for line in printed.splitlines() if line.startswith("── ")]
    assert titles == ["student", "teacher", "score", "thinking", "non-thinking", "what training will meet"]
    assert "\x1b" not in printed
    for text in ("Qwen3ForCausalLM", "fingerprint", "nats a token", "<|im_start|>user", "nothing stands against it"):
        assert text in printed
    assert "both models are loaded and fit together" in printed
    assert not (tmp_path / "outputs").exists()
    log = (tmp_path / "distillation.log").read_text()
    assert "what training will meet" in log


def test_stage_test_and_a_run_warn_of_sequences_longer_than_the_student_s_positions(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = shutil.copytree(STUDENT, tmp_path / "student")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    says = "data.max_length is 96, the student has 64 positions"
    arguments = [*given, f"models.student_model={student}", "evaluation.max_new_tokens=16"]
    assert main(["--stage", "test", *arguments]) == 0
    assert f"  ! {says}" in capsys.readouterr().out
    broken = [*arguments, "teacher.endpoint=127.0.0.1:1"]
    assert main(["--stage", "non_policy", *broken]) == 1
    assert says in capsys.readouterr().out
