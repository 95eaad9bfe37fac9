"""The ready configurations: each is valid, says what it needs, and trains tiny models of its models' architectures."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from student_trainer.__main__ import main
from student_trainer.config import Config
from student_trainer.memory.shapes import KNOWN
from student_trainer.run import run
from student_trainer.settings import load_config
from tests.servers import ROOT, process
from tests.tiny_qwen3 import make

FILES = sorted((ROOT / "config").glob("qwen3-*.yaml"))


def test_there_is_one_for_each_student() -> None:
    names = [load_config(file, [], {}).models.student_model for file in FILES]
    assert sorted(names) == [f"Qwen/Qwen3-{size}" for size in ("0.6B", "1.7B", "4B", "8B")]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_each_is_valid_and_keeps_the_losses_defaults(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--config", str(file), "--dry-run"]) == 0
    config = Config.model_validate(yaml.safe_load(capsys.readouterr().out))
    first, second, plain = config.non_policy_distillation, config.policy_distillation, Config()
    assert (first.temperature, first.alpha, first.beta) == (3.0, 0.7, 0.3)
    assert (second.temperature, second.loss) == (2.0, plain.policy_distillation.loss)
    longest = max(first.max_new_tokens, second.max_new_tokens, config.evaluation.max_new_tokens)
    assert longest < config.data.max_length <= KNOWN[config.models.student_model].positions
    assert config.models.teacher_model in KNOWN


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_each_names_the_teacher_s_command_and_a_node_that_it_fits(file: Path) -> None:
    config, text = load_config(file, [], {}), file.read_text()
    assert f"--model {config.models.teacher_model} --max-sequence-tokens {config.data.max_length}" in text
    conclusions = [line for line in text.splitlines() if line.startswith("#   stage ")]
    assert len(conclusions) == 2
    assert all(line.endswith(": fits") for line in conclusions)


def teacher(folder: Path, experts: bool) -> Path:
    """A tiny random teacher, with experts where the real one has them."""
    from transformers import AutoConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

    make(folder)
    if experts:
        same = AutoConfig.from_pretrained(folder).to_dict()
        kept = {k: v for k, v in same.items() if k not in ("model_type", "architectures", "transformers_version")}
        config = Qwen3MoeConfig(**kept, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
        (folder / "model.safetensors").unlink()
        Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("experts", [True, False], ids=["experts", "dense"])
def test_each_trains_tiny_models_for_some_steps(tmp_path: Path, experts: bool) -> None:
    served = teacher(tmp_path / "teacher", experts)
    student = shutil.copytree(served, tmp_path / "student", ignore=shutil.ignore_patterns("model.safetensors"))
    make(student, hidden_size=16)
    data = tmp_path / "train.json"
    rows = [{"instruction": f"{i} + {i}", "output": str(2 * i)} for i in range(24)]
    data.write_text(json.dumps(rows))
    files = [f for f in FILES if ("235b" in f.stem) == experts]
    with process(tmp_path, "--model", str(served), "--dtype", "float32", "--max-sequence-tokens", "128") as (_, at):
        for file in files:
            outputs = tmp_path / file.stem
            config = load_config(file, changed(student, served, data, outputs, at), {})
            run(config, "all", None, Console(file=io.StringIO()))
            assert (outputs / "policy_distillation" / "final_policy_model" / "model.safetensors").is_file()


def changed(student: Path, teacher: Path, data: Path, outputs: Path, addresses: dict[str, Any]) -> list[str]:
    """Settings that put tiny models and a few steps in the place of a ready configuration's."""
    few = [f"{s}.{k}" for s in ("non_policy_distillation", "policy_distillation") for k in
           ("max_steps=2", "gradient_accumulation_steps=2", "max_new_tokens=24", "num_epochs=1")]  # fmt: skip
    return [
        f"models.student_model={student}", f"models.teacher_model={teacher}", f"data.data_path={data}",
        f"training.output_dir={outputs}", f"training.log_file={outputs}.log", f"teacher.endpoint={addresses['grpc']}",
        "teacher.api_key_file=''", "teacher.ca_file=''", "data.max_length=128", "training.use_tensorboard=false",
        "evaluation.max_new_tokens=24", "evaluation.problems=2", "evaluation.every_epochs=0",
        "training.extra={bf16: true, use_cpu: true}", *few,
    ]  # fmt: skip
