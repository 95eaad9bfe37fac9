"""LoRA and QLoRA: what trains, what the folders hold, merging, going on, and `export`."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer import adapters
from student_trainer.__main__ import main
from student_trainer.config import Models
from student_trainer.errors import UserError
from student_trainer.manifest import damage
from student_trainer.models import describe, load_student, load_tokenizer
from student_trainer.run import run
from tests.student_trainer.conftest import STUDENT
from tests.student_trainer.test_stages import settings

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it

IDS = torch.tensor([[1, 5, 9, 2, 7]])
LORA = {"lora_rank": 4}
QLORA = {"lora_rank": 4, "student_load_in_4bit": True, "torch_dtype": "bfloat16"}


def train(
    folder: Path, endpoint: str, stage: str, models: dict[str, Any], student: Path | None = None, **sections: Any
) -> Path:
    """Runs `stage` below `folder`; its outputs."""
    config = settings(folder, endpoint, models=models, **sections)
    run(config, stage, student, Console(file=io.StringIO()))
    return folder / "outputs"


@pytest.fixture(scope="module")
def stage_one(pair_teacher: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1's folder of a run with LoRA."""
    outputs = train(tmp_path_factory.mktemp("lora"), pair_teacher["grpc"], "non_policy", LORA)
    return outputs / "non_policy_distillation"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=IDS).logits.float())


def student(tmp_path: Path, source: Path = STUDENT, **models: Any) -> Any:
    return load_student(settings(tmp_path, "unused", models=models), source)


def test_new_adapters_change_nothing_and_train_alone(tmp_path: Path) -> None:
    model = student(tmp_path, lora_rank=4)
    assert torch.equal(logits(model), logits(AutoModelForCausalLM.from_pretrained(STUDENT)))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert all("lora_" in name for name in trained)
    layers = model.config.num_hidden_layers
    assert len(trained) == layers * 7 * 2, "two factors for each linear layer of a block"
    some = student(tmp_path, lora_rank=4, lora_targets=["q_proj", "v_proj"])
    assert sum(p.requires_grad for p in some.parameters()) == layers * 2 * 2


def test_targets_that_no_adapter_can_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"models.lora_targets.*query.*name some of down_proj"):
        student(tmp_path, lora_rank=4, lora_targets=["query"])
    with pytest.raises(UserError, match="LM head take no adapter"):
        student(tmp_path, lora_rank=4, lora_targets=["q_proj", "lm_head"])


def test_a_quantised_student_needs_adapters() -> None:
    with pytest.raises(ValidationError, match="set lora_rank"):
        Models(student_load_in_4bit=True)
    with pytest.raises(ValidationError, match="both true"):
        Models(student_load_in_4bit=True, student_load_in_8bit=True, lora_rank=4)


def test_models_are_merged_and_checkpoints_hold_the_adapter_alone(stage_one: Path) -> None:
    base = load_file(STUDENT / "model.safetensors")
    for name in ("best_model", "final_model"):
        folder = stage_one / name
        assert damage(folder) is None
        assert AutoTokenizer.from_pretrained(folder).chat_template
        merged = AutoModelForCausalLM.from_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        assert tensors.keys() == base.keys()
        assert any(not torch.equal(tensors[n], base[n]) for n in base)
        apart = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(STUDENT), folder / "adapter")
        torch.testing.assert_close(logits(merged), logits(apart), atol=1e-4, rtol=1e-4)
    checkpoint = stage_one / "checkpoint-4"
    assert not list(checkpoint.glob("model*.safetensors"))
    for name in ("adapter_model.safetensors", "adapter_config.json", "config.json", "tokenizer.json", "optimizer.pt"):
        assert (checkpoint / name).is_file(), name
    found = adapters.find(checkpoint)
    assert found is not None
    assert (found.rank, Path(found.base), found.alone) == (4, STUDENT, True)


def test_a_run_that_goes_on_trains_the_adapter_as_if_it_had_never_stopped(
    stage_one: Path, tmp_path: Path, pair_teacher: dict[str, Any]
) -> None:
    folder = tmp_path / "outputs" / "non_policy_distillation"
    shutil.copytree(stage_one, folder)
    for name in ("best_model", "final_model", "checkpoint-6", "checkpoint-8"):
        shutil.rmtree(folder / name)
    train(tmp_path, pair_teacher["grpc"], "non_policy", LORA, training={"resume": True})
    there = Path("final_model") / "adapter" / "adapter_model.safetensors"
    first, second = load_file(stage_one / there), load_file(folder / there)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_adapter_goes_on_being_trained_or_is_merged_into_weights_that_are(stage_one: Path, tmp_path: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(stage_one / "final_model"))
    for source in (stage_one / "final_model", stage_one / "checkpoint-8"):
        model = student(tmp_path, source, lora_rank=4)
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
        assert any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n), "the trained adapter"
        whole = student(tmp_path, source)
        torch.testing.assert_close(logits(whole), expected, atol=1e-4, rtol=1e-4)
        assert all(p.requires_grad for p in whole.parameters())
    other = student(tmp_path, stage_one / "final_model", lora_rank=2)
    torch.testing.assert_close(logits(other), expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match=r"has rank 4, 2 is configured.*export"):
        student(tmp_path, stage_one / "checkpoint-8", lora_rank=2)


def test_an_adapter_of_peft_alone_borrows_the_rest_from_its_base(stage_one: Path, tmp_path: Path) -> None:
    config = settings(tmp_path, "unused", models=LORA)
    source = stage_one / "final_model" / "adapter"
    assert {p.name for p in source.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert describe(config, source).eos_ids == describe(config, STUDENT).eos_ids
    assert load_tokenizer(config, source).chat_template


@pytest.mark.slow
def test_a_4_bit_student_trains_in_both_stages_and_is_merged_into_weights_that_are_whole(
    tmp_path: Path, pair_teacher: dict[str, Any]
) -> None:
    outputs = train(tmp_path, pair_teacher["grpc"], "all", QLORA, policy_distillation={"max_steps": 2})
    rows = json.loads((outputs / "summary.json").read_text())["rows"]
    assert rows[2]["forward_kl"] < rows[1]["forward_kl"]
    best = outputs / "policy_distillation" / "best_policy_model"
    found = adapters.find(best)
    assert found is not None
    assert Path(found.base) == STUDENT, "stage 2 went on with stage 1's adapter"
    whole = AutoModelForCausalLM.from_pretrained(STUDENT, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(whole, found.folder).merge_and_unload()
    tensors = load_file(best / "model.safetensors")
    assert all(torch.equal(tensors[n], p) for n, p in merged.state_dict().items() if n in tensors)
    assert "quantization_config" not in json.loads((best / "config.json").read_text())


@pytest.mark.slow
def test_an_adapter_that_is_not_merged_starts_the_second_stage(tmp_path: Path, pair_teacher: dict[str, Any]) -> None:
    alone = LORA | {"merge_adapters": False}
    outputs = train(tmp_path, pair_teacher["grpc"], "all", alone, policy_distillation={"max_steps": 2})
    for folder in ("non_policy_distillation/best_model", "policy_distillation/final_policy_model"):
        assert not (outputs / folder / "model.safetensors").exists()
        assert (outputs / folder / "adapter_model.safetensors").is_file()
        assert (outputs / folder / "tokenizer.json").is_file()
    again = tmp_path / "again"
    named = outputs / "non_policy_distillation" / "best_model"
    train(again, pair_teacher["grpc"], "policy", LORA, named, policy_distillation={"max_steps": 2})
    assert (again / "outputs" / "policy_distillation" / "final_policy_model" / "model.safetensors").is_file()


def test_export_merges_and_checks_what_it_wrote(
    stage_one: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "exported"
    assert main(["export", str(stage_one / "checkpoint-8"), str(target)]) == 0
    assert "the adapter of rank 4 merged into" in capsys.readouterr().out
    assert damage(target) is None
    assert json.loads((target / "training_config.json").read_text())["step"] == 8
    exported, merged = (load_file(f / "model.safetensors") for f in (target, stage_one / "final_model"))
    assert all(torch.equal(exported[name], merged[name]) for name in merged)
    assert main(["export", str(stage_one / "checkpoint-8"), str(target)]) == 1
    assert "is there already" in capsys.readouterr().err
    assert main(["export", str(tmp_path), str(tmp_path / "other")]) == 1
    assert "is no model folder" in capsys.readouterr().err
    assert main(["export", str(stage_one / "final_model"), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert load_file(tmp_path / "half" / "model.safetensors")["model.norm.weight"].dtype is torch.bfloat16
    assert not list(tmp_path.glob(".*.staging"))
