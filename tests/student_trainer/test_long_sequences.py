"""Activation checkpointing under the Trainer, and sequences as long as a thinking trace."""

from __future__ import annotations

import io
import json
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer import packing
from student_trainer.batches import Row, completion_ids
from student_trainer.checkpoints import off_policy_layout
from student_trainer.config import Config
from student_trainer.distillation_trainer import DistillationTrainer
from student_trainer.feed import MicroBatch
from student_trainer.losses import Objective, TeacherTargets
from student_trainer.objective_forward import accept_objective
from student_trainer.run import run
from student_trainer.schedule import Step
from student_trainer.stage import arguments
from student_trainer.stage_loss import StageLoss
from tests.servers import process
from tests.tiny_qwen3 import make

VOCABULARY = 261


class UnequalFeed:
    """Eight sequences of 10 to 200 tokens, and cross-entropy on their second half."""

    ahead = 1

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        sizes = rng.permutation([10, 20, 30, 40, 50, 60, 180, 200])
        self.rows = [Row(rng.integers(VOCABULARY, size=n, dtype=np.int32), int(n) // 2) for n in sizes]

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self) -> list[int]:
        return [len(row.ids) for row in self.rows]

    def announce(self, step: Step) -> None:
        """Nothing to ask for."""

    def take(self, step: Step) -> list[MicroBatch]:
        return [self._batch([self.rows[i] for i in indices]) for indices in step.micro_batches]

    def save(self, folder: Path, step: int) -> None:
        """Nothing is under way."""

    def restore(self, folder: Path) -> None:
        """Nothing was saved."""

    def _batch(self, rows: list[Row]) -> MicroBatch:
        tokens = torch.from_numpy(completion_ids(rows))
        none, zeros = torch.zeros((len(tokens), 0)), torch.zeros(len(tokens))
        targets = TeacherTargets(none.long(), none, zeros, zeros, 1.0, tokens, zeros)
        return MicroBatch(rows, lambda: (), lambda scores: targets)


class Kept:
    """Bytes of the tensors that a forward pass leaves for its backward pass, parameters left out."""

    def __init__(self, model: Any) -> None:
        self.bytes, self._seen = 0, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self.bytes += tensor.numel() * tensor.element_size()
        return tensor


def one_step(
    folder: Path, student: Path, *, recompute: bool, packed: bool, lora: bool = False
) -> tuple[dict[str, torch.Tensor], int, dict[str, Any]]:
    """The trained weights, the bytes that the forward passes kept, and the log row of one step by plain descent."""
    config = Config.model_validate(
        {
            "training": {
                "output_dir": str(folder),
                "gradient_checkpointing": recompute,
                "logging_steps": 1,
                "warmup_ratio": 0,
                "extra": {"optim": "sgd", "use_cpu": True, "save_strategy": "no"},
            },
            "non_policy_distillation": {
                "batch_size": 4,
                "gradient_accumulation_steps": 2,
                "learning_rate": 1.0,
                "max_steps": 1,
            },
        }
    )
    layout = off_policy_layout(str(folder))
    model = AutoModelForCausalLM.from_pretrained(student)
    if lora:
        torch.manual_seed(0)
        adapters = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, init_lora_weights=False)
        model = get_peft_model(model, adapters)
    trainer = DistillationTrainer(
        packing.set_up(accept_objective(model), packed),
        arguments(config, config.non_policy_distillation, layout),
        UnequalFeed(),
        StageLoss(Objective("forward_kl", alpha=0.0, beta=1.0), 1.0, 0, VOCABULARY),
        layout=layout,
        tokenizer=AutoTokenizer.from_pretrained(student),
        evaluator=lambda _: None,
        about=lambda step, measured: {"step": step, "measured": measured},
        save_total_limit=None,
    )
    kept = Kept(model)
    with saved_tensors_hooks(kept, lambda tensor: tensor):
        trainer.train()
    assert model.training
    trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return trained, kept.bytes, trainer.state.log_history[0]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("student"), num_hidden_layers=6, initializer_range=0.05)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft 0.21 asks for it
@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_trains_alike_and_keeps_little(tmp_path: Path, student: Path, lora: bool) -> None:
    plain, kept, _ = one_step(tmp_path / "plain", student, recompute=False, packed=True, lora=lora)
    again, fewer, _ = one_step(tmp_path / "again", student, recompute=True, packed=True, lora=lora)
    before = dict(AutoModelForCausalLM.from_pretrained(student).named_parameters())
    assert lora or any(not torch.equal(plain[n], before[n]) for n in plain)
    assert plain.keys() == again.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(tensor, again[name], rtol=1e-5, atol=1e-6, msg=name)
    assert fewer < kept / 4


@pytest.mark.parametrize("recompute", [False, True])
def test_packing_trains_alike_without_padding(tmp_path: Path, student: Path, recompute: bool) -> None:
    packed, kept, row = one_step(tmp_path / "packed", student, recompute=recompute, packed=True)
    padded, more, padded_row = one_step(tmp_path / "padded", student, recompute=recompute, packed=False)
    for name, tensor in packed.items():
        torch.testing.assert_close(tensor, padded[name], rtol=1e-5, atol=1e-6, msg=name)
    assert row["padding_share"] == 0
    # 180 and 200 in one pass, 10 to 60 in the other; by number it would be 590 tokens in 4 x 200 + 4 x 40.
    assert padded_row["padding_share"] == pytest.approx(1 - 590 / (2 * 200 + 6 * 60))
    assert row["loss"] == pytest.approx(padded_row["loss"], rel=1e-6)
    assert recompute or kept < more


LONG = 32_768


@pytest.mark.slow
def test_a_thinking_trace_of_32768_tokens_is_scored_and_trained_on(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    student = make(tmp_path / "student", max_position_embeddings=LONG, initializer_range=0.05, **sizes, **heads)
    (tmp_path / "server").mkdir()
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": "Add", "input": f"{i}+1", "output": str(i + 1)} for i in range(2)]))
    teacher = "--model", str(student), "--dtype", "float32", "--max-sequence-tokens", str(LONG)
    with process(tmp_path / "server", *teacher) as (_, addresses):

        def go(**options: Any) -> list[dict[str, Any]]:
            stage = {
                "num_epochs": 1,
                "batch_size": 1,
                "gradient_accumulation_steps": 1,
                "top_k": 64,
                "max_new_tokens": 2,
            }
            values = {
                "models": {"student_model": str(student), "torch_dtype": "float32", "load_in_4bit": False},
                "data": {"data_path": str(data), "val_ratio": 0, "max_length": LONG},
                "training": {
                    "output_dir": str(tmp_path / "outputs"),
                    "log_file": str(tmp_path / "log"),
                    "gradient_checkpointing": True,
                    "logging_steps": 1,
                    "use_tensorboard": False,
                },
                "non_policy_distillation": {**stage, "modes": "thinking", **options},
                "evaluation": {"problems": 1, "max_new_tokens": 2},
                "teacher": {"endpoint": addresses["grpc"]},
            }
            run(Config.model_validate(values), "non_policy", None, Console(file=io.StringIO()))
            lines = (tmp_path / "outputs" / "non_policy_distillation" / "metrics.jsonl").read_text().splitlines()
            return [json.loads(line) for line in lines]

        go(max_steps=1)
        responses = tmp_path / "responses.parquet"
        (tmp_path / "outputs" / "non_policy_distillation" / "responses.parquet").rename(responses)
        lengthen(responses / "part-00000.parquet")
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = go(dataset_path=str(responses), max_steps=1)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    (row,) = (line for line in found if "soft_loss" in line)
    assert row["completion_tokens"] > LONG - 100
    assert 0 < row["grad_norm"] < float("inf")
    assert row["soft_loss"] < 1e-6, "the student is its own teacher, at every position"
    assert row["padding_share"] == 0
    assert grown < 0.5, "a mask of all tokens by all tokens would be 1 GiB, scores of all of them 4 GiB"


def lengthen(part: Path) -> None:
    """Gives every response so many tokens that its sequence has LONG."""
    table, rng = parquet.read_table(part), np.random.default_rng(0)
    ids = [rng.integers(200, size=LONG - len(p), dtype=np.int32) for p in table["prompt_ids"].to_pylist()]
    column = table.schema.get_field_index("completion_ids")
    table = table.set_column(column, table.schema.field(column), pa.array(ids, table.schema.field(column).type))
    parquet.write_table(table, part)
