"""Two processes under torchrun on the CPU: the same weights as one, one set of files, errors that end the run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from student_trainer import distributed
from tests.servers import ROOT, environment
from tests.student_trainer.test_stages import settings


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


@dataclass(frozen=True)
class Curves:
    """What both stages of a run logged and measured, and the tokens that the teacher was asked to score for it."""

    lines: list[dict[str, float]]
    tokens: float
    outputs: Path


def curves(folder: Path, processes: int, teacher: dict[str, Any], **training: Any) -> Curves:
    """A run of both stages with 8 sequences a step, whatever the number of processes."""
    stage = {"batch_size": 4 // processes, "gradient_accumulation_steps": 2, "max_steps": 3, "num_epochs": 1}
    before = asked(teacher)
    sections = {"non_policy_distillation": stage, "policy_distillation": stage | {"max_steps": 2}}
    torchrun(folder, processes, teacher["grpc"], "all", training={"save_steps": 2} | training, **sections)
    outputs = folder / "outputs"
    files = [outputs / f"{name}_distillation" / "metrics.jsonl" for name in ("non_policy", "policy")]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return Curves([line for line in lines if "loss" in line or "eval_loss" in line], asked(teacher) - before, outputs)


def asked(teacher: dict[str, Any]) -> float:
    """Tokens of sequences that the teacher was ever asked to score, whether it knew their scores already or not."""
    text = httpx.get(f"{teacher['http']}/metrics").text
    found = re.findall(r"^teacher_(?:scored|cached|joined)_tokens_total{.*} (\S+)$", text, re.MULTILINE)
    return sum(map(float, found))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, pair_teacher: dict[str, Any]) -> Curves:
    """The run of one process."""
    return curves(tmp_path_factory.mktemp("alone"), 1, pair_teacher)


NUMBERS = ("loss", "soft_loss", "forward_kl", "reverse_kl", "grad_norm", "eval_loss", "eval_forward_kl")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp", "deepspeed"])
def test_two_processes_give_the_curve_of_one_in_both_stages(
    way: str, alone: Curves, tmp_path: Path, pair_teacher: dict[str, Any]
) -> None:
    if way == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra deepspeed)")
    both = curves(tmp_path, 2, pair_teacher, parallel=way)
    assert len(both.lines) == len(alone.lines) >= 7
    for one, other in zip(alone.lines, both.lines, strict=True):
        for name in NUMBERS:
            if name in one:
                assert other[name] == pytest.approx(one[name], abs=1e-5, rel=1e-5), (name, one, other)
    assert both.tokens == alone.tokens, "each process asks the teacher for its own rows alone"
    for folder in ("non_policy_distillation/best_model", "policy_distillation/policy_checkpoint-2"):
        first, second = (load_file(o / folder / "model.safetensors") for o in (alone.outputs, both.outputs))
        assert first.keys() == second.keys()
        assert max(float((first[n] - second[n]).abs().max()) for n in first) < 1e-4
        model = AutoModelForCausalLM.from_pretrained(both.outputs / folder)
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp", "deepspeed"])
def test_adapters_train_on_sharded_weights_and_are_merged(
    way: str, tmp_path: Path, pair_teacher: dict[str, Any]
) -> None:
    if way == "deepspeed":
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed (extra deepspeed)")
    stage = {"batch_size": 2, "max_steps": 2}
    sections = {"models": {"lora_rank": 4}, "training": {"parallel": way}, "non_policy_distillation": stage}
    torchrun(tmp_path, 2, pair_teacher["grpc"], "non_policy", **sections)
    folder = tmp_path / "outputs" / "non_policy_distillation"
    assert not (folder / "checkpoint-2" / "model.safetensors").exists()
    adapter = load_file(folder / "final_model" / "adapter" / "adapter_model.safetensors")
    assert any(float(t.abs().max()) > 0 for name, t in adapter.items() if "lora_B" in name)
    model = AutoModelForCausalLM.from_pretrained(folder / "final_model")
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


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
