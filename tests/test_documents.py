"""The user's document, run as written on the embedded pair, and several trainers at one teacher.

The commands stand in a copy of the tree whose config/distillation_config.yaml holds a run of a few steps, because a
command without `--config` reads that file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.servers import process

ROOT = Path(__file__).resolve().parents[1]

SMALL: dict[str, Any] = {
    "models": {
        "teacher_model": "tiny_pair/teacher",
        "student_model": "tiny_pair/student_base",
        "load_in_4bit": False,
        "torch_dtype": "float32",
    },
    "data": {"data_path": "dataset/arithmetic.json", "max_length": 96, "max_examples": 24, "val_ratio": 0.2},
    "training": {"logging_steps": 1, "save_steps": 2, "save_total_limit": None},
    "non_policy_distillation": {
        "num_epochs": 1,
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 4,
        "top_k": 8,
        "max_new_tokens": 24,
    },
    "policy_distillation": {
        "num_epochs": 1,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "top_k": 8,
        "max_new_tokens": 24,
    },
    "evaluation": {"verifier": "final_answer", "problems": 4, "max_new_tokens": 24, "show": 1},
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tracked files in a folder with a space in its name, with the small configuration in it."""
    folder = tmp_path_factory.mktemp("documents") / "a clone"
    names = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    (folder / "config" / "distillation_config.yaml").write_text(yaml.safe_dump(SMALL))
    return folder


def run(tree: Path, command: str, *, expect: int = 0, timeout: int = 280) -> str:
    """What a documented command prints; `python` and `torchrun` are those of this environment."""
    words = command.split()
    programs = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [*programs[words[0]], *words[1:]], cwd=tree, capture_output=True, text=True, env=environment, timeout=timeout
    )
    assert done.returncode == expect, f"{command}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def holds_a_model(folder: Path) -> bool:
    """Whether the documented files are there and load."""
    assert (folder / "config.json").is_file()
    assert (folder / "tokenizer.json").is_file()
    assert json.loads((folder / "training_config.json").read_text())["config"]["data"]["max_length"] == 96
    AutoTokenizer.from_pretrained(folder)
    return bool(AutoModelForCausalLM.from_pretrained(folder).num_parameters())


@pytest.mark.slow
def test_the_commands_of_the_document_in_its_order(tree: Path) -> None:
    kept = (tree / "config" / "distillation_config.yaml").read_text()
    os.rename(tree / "config" / "distillation_config.yaml", tree / "my_config.yaml")
    run(tree, "python main_distillation.py --create_config")
    created = (tree / "config" / "distillation_config.yaml").read_text()
    assert yaml.safe_load(created)["non_policy_distillation"]["temperature"] == 3.0
    (tree / "config" / "distillation_config.yaml").write_text(kept)

    assert "both models are loaded" in run(tree, "python main_distillation.py --stage test")

    run(tree, "python main_distillation.py --stage non_policy")
    first = tree / "outputs" / "non_policy_distillation"
    assert all(holds_a_model(first / name) for name in ("best_model", "final_model", "checkpoint-2"))

    best = "./outputs/non_policy_distillation/best_model"
    run(tree, f"python main_distillation.py --stage policy --pretrained_student {best}")
    second = tree / "outputs" / "policy_distillation"
    names = ("best_policy_model", "final_policy_model", "policy_checkpoint-2")
    assert all(holds_a_model(second / name) for name in names)

    checkpoint = "./outputs/non_policy_distillation/checkpoint-2"
    run(tree, f"python main_distillation.py --stage policy --pretrained_student {checkpoint}")
    assert "checkpoint-2" in json.loads((tree / "outputs" / "summary.json").read_text())["rows"][1]["model"]
    assert "stage 2, on-policy step 3/3" in (tree / "distillation.log").read_text()
    assert list((tree / "outputs").glob("policy_distillation.*")), "the earlier run of stage 2 must be kept aside"


@pytest.mark.slow
def test_a_whole_run_from_a_json_file_goes_on_where_it_stopped(tree: Path) -> None:
    (tree / "my_config.json").write_text(json.dumps(SMALL | {"training": SMALL["training"] | {"output_dir": "out"}}))
    run(tree, "python main_distillation.py --config my_config.json --stage all")
    rows = [row["model"] for row in json.loads((tree / "out" / "summary.json").read_text())["rows"]]
    assert rows == ["teacher", "student before", "after stage 1", "after stage 2"]
    shutil.rmtree(tree / "out" / "policy_distillation" / "final_policy_model")
    shown = run(tree, "python main_distillation.py --config my_config.json --stage all --resume")
    assert "is finished, going on after it" in shown
    assert "going on from" in shown
    assert holds_a_model(tree / "out" / "policy_distillation" / "final_policy_model")


@pytest.mark.slow
def test_torchrun_with_two_processes(tree: Path) -> None:
    run(tree, "torchrun --nproc_per_node=2 main_distillation.py training.output_dir=two")
    assert holds_a_model(tree / "two" / "policy_distillation" / "final_policy_model")


@pytest.mark.slow
def test_two_trainers_at_one_teacher_over_either_transport(tree: Path, tmp_path: Path) -> None:
    with process(tmp_path, "--model", str(ROOT / "tiny_pair" / "teacher")) as (_, addresses):
        trainers = [
            subprocess.Popen(
                [
                    *(sys.executable, "main_distillation.py", f"training.output_dir={name}"),
                    *(f"training.log_file={name}.log", f"teacher.endpoint={addresses[name]}"),
                ],
                cwd=tree,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)},
                stdout=subprocess.DEVNULL,
            )
            for name in ("grpc", "http")
        ]
        assert [trainer.wait(280) for trainer in trainers] == [0, 0]
        metrics = httpx.get(f"{addresses['http']}/metrics").text
    for name in ("grpc", "http"):
        assert holds_a_model(tree / name / "policy_distillation" / "final_policy_model")
        calls = re.findall(
            rf'teacher_requests_total{{client=".*",method="score",outcome="(\w+)",transport="{name}"}} (\S+)', metrics
        )
        assert dict(calls).keys() == {"OK"}, f"{name}: {calls}"
