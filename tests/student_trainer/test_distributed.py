"""Two processes under torchrun on the CPU: the same weights as one, one set of files, errors that end the run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from student_trainer import distributed
from tests.servers import ROOT, environment
from tests.student_trainer.test_stages import settings

SGD = {
    "max_grad_norm": 0.0,
    "extra": {"optim": "sgd"},
    "lr_scheduler_type": "constant",
    "warmup_ratio": 0.0,
    "save_steps": 2,
}


def torchrun(folder: Path, processes: int, endpoint: str | None, stage: str, **sections: dict[str, Any]) -> str:
    """What `torchrun main_distillation.py` printed."""
    config = settings(folder, endpoint or "unused", **sections).model_dump(mode="json")
    config["teacher"]["endpoint"] = endpoint
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(ROOT / "main_distillation.py")]
    command += ["--config", str(folder / "config.json"), "--stage", stage]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_alone_every_function_is_the_plain_one() -> None:
    distributed.start()
    assert (distributed.rank(), distributed.world(), distributed.is_main()) == (0, 1, True)
    assert distributed.gather("x") == ["x"]
    assert distributed.on_main(lambda: 7) == 7
    distributed.barrier()
    distributed.stop()


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path, pair_teacher: dict[str, Any]) -> None:
    stage = {"gradient_accumulation_steps": 2, "learning_rate": 0.1, "max_steps": 3}
    one = {"training": SGD, "non_policy_distillation": stage | {"batch_size": 4}}
    two = {"training": SGD, "non_policy_distillation": stage | {"batch_size": 2}}
    torchrun(tmp_path / "one", 1, pair_teacher["grpc"], "non_policy", **one)
    torchrun(tmp_path / "two", 2, pair_teacher["grpc"], "non_policy", **two)
    inside = Path("outputs") / "non_policy_distillation" / "final_model" / "model.safetensors"
    first, second = (load_file(tmp_path / name / inside) for name in ("one", "two"))
    assert max(float((first[n] - second[n]).abs().max()) for n in first) < 1e-6


@pytest.mark.slow
def test_two_processes_share_a_teacher_that_the_first_one_starts(tmp_path: Path) -> None:
    models = {"teacher_model": str(ROOT / "tiny_pair" / "teacher")}
    shown = torchrun(tmp_path, 2, None, "all", models=models, policy_distillation={"max_steps": 2})
    assert len(re.findall("stage 1, off-policy step 1/", shown)) == 1
    assert shown.count("after stage 2") == 1
    folder = tmp_path / "outputs" / "policy_distillation"
    assert (folder / "best_policy_model" / "model.safetensors").is_file()
    states = sorted(p.name for p in (folder / "policy_checkpoint-2").glob("rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]
    log = (tmp_path / "outputs" / "teacher.log").read_text()
    assert log.count("loading") == 1
    assert "WORLD_SIZE" not in os.environ
    again = torchrun(
        tmp_path, 2, None, "all", models=models, policy_distillation={"max_steps": 2}, training={"resume": True}
    )
    assert again.count("is finished, going on after it") == 2
