"""What the student hands over: the names of its checkpoint, adapters merged, and nothing of it changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from student_trainer.errors import UserError
from student_trainer.rollouts.weights import full_weights
from tests.student_trainer.rollouts.engines import make_student

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT reads it


def adapted(folder: Path, **options: Any) -> Any:
    """The tiny student with an adapter that is not zero."""
    torch.manual_seed(1)
    model = peft.get_peft_model(make_student(folder), peft.LoraConfig(r=4, target_modules="all-linear", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    return model


def test_weights_are_the_students_own_tensors_by_their_checkpoints_names(student: Any) -> None:
    found = dict(full_weights(student))
    parameters = dict(student.named_parameters())
    assert found.keys() == parameters.keys()
    assert "lm_head.weight" not in found
    assert all(found[n].data_ptr() == p.data_ptr() for n, p in parameters.items())


def test_adapters_are_merged_as_peft_merges_them_and_stay_apart_in_the_student(tmp_path: Path) -> None:
    model = adapted(tmp_path / "student")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = {name: tensor.clone() for name, tensor in full_weights(model)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    merged = dict(model.merge_and_unload().named_parameters())
    assert found.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_handed_over_weights_answer_as_the_student_with_its_adapters_does(tmp_path: Path) -> None:
    model = adapted(tmp_path / "student").eval()
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32).eval()
    other.load_state_dict(dict(full_weights(model)), strict=False)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(other(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_adapters_that_are_not_plain_lora_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"only plain LoRA on linear layers is merged"):
        list(full_weights(adapted(tmp_path / "student", use_dora=True)))
