"""How processes share a training: what is chosen, refused and taken back; shards themselves are in test_distributed."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from student_trainer import distributed, parallel
from student_trainer.config import Models, Training
from student_trainer.errors import UserError
from student_trainer.sharding import whole


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were one of two processes."""
    monkeypatch.setattr(distributed, "world", lambda: 2)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("way", ["fsdp", "deepspeed"])
def test_the_launcher_decides_where_the_configuration_does_not(way: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parallel.chosen(Training()) == "ddp"
    assert parallel.chosen(Training(parallel=way)) == way
    monkeypatch.setenv(f"ACCELERATE_USE_{way.upper()}", "true")
    assert parallel.chosen(Training()) == parallel.chosen(Training(parallel=way)) == way
    with pytest.raises(UserError, match=rf"'ddp' is configured, accelerate launch says '{way}'"):
        parallel.chosen(Training(parallel="ddp"))


def test_one_process_shards_nothing() -> None:
    assert parallel.chosen(Training(parallel="fsdp")) == "ddp"


def test_each_process_loads_the_whole_student_and_saves_a_whole_one() -> None:
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    parallel.prepare_environment(fsdp)
    assert fsdp["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"
    zero = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true"}
    parallel.prepare_environment(zero)
    assert zero["ACCELERATE_DEEPSPEED_ZERO3_INIT"] == "false"
    assert zero["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"
    plain = {"PATH": "x"}
    parallel.prepare_environment(plain)
    assert plain == {"PATH": "x"}


def test_a_stage_leaves_no_trace_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "false")
    with parallel.no_traces():
        os.environ["ACCELERATE_USE_FSDP"] = "true"
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert os.environ["FSDP_OFFLOAD_PARAMS"] == "false", "what was there before stays"


def test_a_quantised_student_is_not_sharded() -> None:
    with pytest.raises(UserError, match="fsdp cannot shard a quantised student"):
        parallel.arguments(Training(), Models(lora_rank=4, student_load_in_4bit=True), "fsdp")
    assert parallel.arguments(Training(), Models(lora_rank=4, student_load_in_4bit=True), "ddp")


def test_fsdp_recomputes_activations_itself() -> None:
    assert parallel.checkpoints_itself("fsdp")
    found = parallel.arguments(Training(gradient_checkpointing=True), Models(), "fsdp")
    assert found == {"fsdp": True, "fsdp_config": {"version": 2, "activation_checkpointing": True}}


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
def test_deepspeed_that_is_not_installed_is_named() -> None:
    with pytest.raises(UserError, match=r"strong2weak\[deepspeed\]"):
        parallel.arguments(Training(), Models(), "deepspeed")


def test_a_deepspeed_file_whose_checkpoints_would_be_empty_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel, "find_spec", lambda name: name)
    file = tmp_path / "ds.json"
    training = Training(deepspeed_config=str(file))
    with pytest.raises(UserError, match="name a JSON file"):
        parallel.arguments(training, Models(), "deepspeed")
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    with pytest.raises(UserError, match="stage3_gather_16bit_weights_on_model_save"):
        parallel.arguments(training, Models(), "deepspeed")
    file.write_text(json.dumps(parallel.ZERO_3))
    assert parallel.arguments(training, Models(), "deepspeed") == {"deepspeed": parallel.ZERO_3, "bf16": True}


def test_a_model_that_is_not_sharded_is_whole() -> None:
    model = torch.nn.Linear(2, 2)
    with whole(model):
        assert model(torch.ones(1, 2)).shape == (1, 2)
