"""`collect` as users run it: killed and gone on with, reused by a training, and its mistakes."""

from __future__ import annotations

import fcntl
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protos.scores import Mode
from student_trainer import responses
from student_trainer.__main__ import main
from student_trainer.unfinished import left_over
from tests.servers import ROOT, wait_for
from tests.student_trainer.conftest import STUDENT
from tests.student_trainer.live import environment


def settings(folder: Path, endpoint: str, prompts: int) -> list[str]:
    return [
        f"models.student_model={STUDENT}", f"data.data_path={ROOT / 'dataset' / 'arithmetic.json'}",
        f"data.max_examples={prompts}", "data.max_length=96", f"training.output_dir={folder / 'outputs'}",
        f"training.log_file={folder / 'log'}", f"teacher.endpoint={endpoint}", "teacher.patience=0",
        "teacher.max_in_flight=1", "non_policy_distillation.max_new_tokens=48",
    ]  # fmt: skip


def rows_of(folder: Path) -> dict[tuple[str, Mode, int], np.ndarray]:
    """What lies in a folder, parts and unfinished ones."""
    found = responses.read(folder)[0] if list(folder.glob("*.parquet")) else []
    found += [row for _, table in left_over(folder) for row in responses._rows(table)]
    return {(r.example_id, r.mode, r.sample): r.completion_ids for r in found}


def test_a_killed_collection_asks_for_nothing_twice(
    pair_teacher: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = settings(tmp_path, pair_teacher["grpc"], 80), tmp_path / "data"
    command = [sys.executable, "-m", "student_trainer", "collect", "--out", str(out), "--samples", "2", *given]
    running = subprocess.Popen(command, env=environment(), cwd=tmp_path, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: running.poll() is not None or sum(p.stat().st_size for p in out.glob(".*.arrows")) > 6_000)
        assert running.poll() is None, "it ended before it could be killed"
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    kept = rows_of(out)
    assert kept
    assert main(["collect", "--resume", "--out", str(out), "--samples", "2", *given]) == 0
    printed = capsys.readouterr().out
    asked = re.search(r"asked for ([\d,]+) of ([\d,]+) responses now", printed)
    assert asked is not None, printed
    now, total = (int(text.replace(",", "")) for text in asked.groups())
    found = rows_of(out)
    assert (now, total) == (len(found) - len(kept), len(found))
    assert total == 72 * 2 * 2
    assert not list(out.glob(".*.arrows"))
    for key, ids in kept.items():
        np.testing.assert_array_equal(found[key], ids)
    assert len(responses.read(out)[0]) == total, "a response is there twice"
    assert f"non_policy_distillation.dataset_path={out}" in printed
    assert re.search(r"^thinking +144 responses to 72 prompts, [\d,]+ tokens .*ended by", printed, re.MULTILINE)
    assert main(["collect", "--resume", "--out", str(out), "--samples", "2", *given]) == 0
    assert f"all {total:,} responses were there, nothing was asked for" in capsys.readouterr().out


def test_more_samples_are_other_ones(
    pair_teacher: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = settings(tmp_path, pair_teacher["grpc"], 12), tmp_path / "data"
    warm = ["non_policy_distillation.response_temperature=1.5", "non_policy_distillation.response_top_p=1.0"]
    arguments = ["--out", str(out), "--modes", "thinking", *given, *warm]
    assert main(["collect", "--samples", "1", *arguments]) == 0
    first = rows_of(out)
    assert {mode for _, mode, _ in first} == {Mode.THINKING}
    assert main(["collect", "--samples", "3", "--resume", *arguments]) == 0
    assert "asked for 22 of 33 responses now" in capsys.readouterr().out
    found = rows_of(out)
    assert all(np.array_equal(found[key], ids) for key, ids in first.items())
    for one, _, _ in first:
        texts = {found[one, Mode.THINKING, s].tobytes() for s in range(3)}
        if len(texts) == 3:
            break
    else:
        pytest.fail("no prompt has three different samples")


def test_only_the_tokenizer_of_the_student_is_needed_and_a_training_takes_the_result(
    pair_teacher: dict[str, Any], tmp_path: Path
) -> None:
    student = shutil.copytree(STUDENT, tmp_path / "student", ignore=shutil.ignore_patterns("*.safetensors"))
    given = settings(tmp_path, pair_teacher["http"], 8)
    assert main(["collect", *given, f"models.student_model={student}"]) == 0
    dataset = tmp_path / "outputs" / "responses.parquet"
    training = [
        f"non_policy_distillation.dataset_path={dataset}", "non_policy_distillation.max_steps=1",
        "training.use_tensorboard=false", "models.torch_dtype=float32", "evaluation.every_epochs=0",
        "evaluation.max_new_tokens=24",
    ]  # fmt: skip
    assert main(["--stage", "non_policy", *given, *training]) == 0
    assert (tmp_path / "outputs/non_policy_distillation/final_model/model.safetensors").is_file()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("there", "is there already; go on with it (--resume), or name a new folder"),
        ("file", "is a file, a dataset is a folder of parts; name a new folder"),
        ("locked", "another process collects into"),
        ("away", "Unavailable); start the teacher"),
        ("samples", "non_policy_distillation.samples_per_prompt: should be greater than or equal to 1"),
    ],
)
def test_mistakes_are_one_line(
    pair_teacher: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, says: str
) -> None:
    out, arguments = tmp_path / "data", settings(tmp_path, pair_teacher["grpc"], 4)
    if case == "there":
        (out / "x").mkdir(parents=True)
    elif case == "file":
        out.write_text("")
    elif case == "away":
        arguments.append("teacher.endpoint=127.0.0.1:1")
    elif case == "samples":
        arguments += ["--samples", "0"]
    if case == "locked":
        out.mkdir()
        with (out / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert main(["collect", "--resume", "--out", str(out), *arguments]) == 1
    else:
        assert main(["collect", "--out", str(out), *arguments]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: ") and says in line] == lines[-1:]
