"""Loading students: what a user gets wrong ends in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from student_trainer.config import Config
from student_trainer.errors import UserError
from student_trainer.models import describe, eos_ids, load_student, load_tokenizer, resolve_attention, resolve_dtype
from student_trainer.stage import warn_of_rounding
from tests.student_trainer.conftest import STUDENT


def config(dtype: str = "float32", **models: str) -> Config:
    return Config.model_validate({"models": {"student_model": str(STUDENT), "torch_dtype": dtype, **models}})


def test_a_student_has_the_configured_dtype() -> None:
    assert load_student(config("bfloat16")).dtype is torch.bfloat16
    assert load_student(config("auto")).dtype is torch.float32
    assert resolve_dtype("float16") is torch.float16
    with pytest.raises(UserError, match="int8"):
        resolve_dtype("int8")


def test_a_description_needs_no_weights(tmp_path: Path) -> None:
    folder = tmp_path / "student"
    shutil.copytree(STUDENT, folder)
    (folder / "model.safetensors").unlink()
    found = describe(config(), folder)
    model = load_student(config())
    assert found.logits_width == model.get_output_embeddings().weight.shape[0]
    assert found.eos_ids == eos_ids(model.generation_config, found.tokenizer)
    assert found.tokenizer.padding_side == "left"


def test_end_ids_come_from_the_generation_configuration_first() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STUDENT)
    assert eos_ids(GenerationConfig(eos_token_id=[3, 4]), tokenizer) == (3, 4)
    assert eos_ids(GenerationConfig(eos_token_id=5), tokenizer) == (5,)
    assert eos_ids(GenerationConfig(), tokenizer) == (tokenizer.eos_token_id,)


def test_attention_is_chosen_by_what_is_there() -> None:
    assert resolve_attention("eager") == "eager"
    assert resolve_attention("auto") in ("sdpa", "flash_attention_2")


def test_a_wrong_path_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder .*nothing"):
        load_student(config(), tmp_path / "nothing")
    (tmp_path / "outputs").mkdir()
    shutil.copytree(STUDENT, tmp_path / "outputs" / "best_model")
    with pytest.raises(UserError, match="best_model, name one of them"):
        load_student(config(), tmp_path / "outputs")
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        load_student(config(), tmp_path / "file")


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    shutil.copytree(STUDENT, tmp_path / "student")
    (tmp_path / "student" / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(config(), tmp_path / "student")


def test_a_rate_that_bfloat16_rounds_away_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Linear(64, 64)
    torch.nn.init.normal_(model.weight, std=0.02)
    warn_of_rounding(model, 1e-5)
    assert not caplog.records
    warn_of_rounding(model.to(torch.bfloat16), 1e-5)
    assert "rounded away" in caplog.text
    caplog.clear()
    warn_of_rounding(model, 1e-3)
    assert not caplog.records
