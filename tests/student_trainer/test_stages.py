"""Both stages against a real teacher: layout, what is asked for, going on after an interruption, errors on the way."""

from __future__ import annotations

import io
import json
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from student_trainer import score_store
from student_trainer.checkpoints import fault
from student_trainer.config import Config
from student_trainer.distillation_trainer import DistillationTrainer
from student_trainer.errors import UserError
from student_trainer.manifest import damage, seal
from student_trainer.run import run
from tests.servers import ROOT
from tests.student_trainer.conftest import STUDENT

Run = Callable[..., str]


def settings(folder: Path, endpoint: str, **sections: dict[str, Any]) -> Config:
    """A run of a few steps below `folder`; `sections` win over what is here."""
    values: dict[str, dict[str, Any]] = {
        "models": {"student_model": str(STUDENT), "torch_dtype": "float32", "load_in_4bit": False},
        "data": {
            "data_path": str(ROOT / "dataset" / "arithmetic.json"),
            "val_path": str(ROOT / "dataset" / "arithmetic_heldout.json"),
            "max_length": 96,
            "max_examples": 16,
        },
        "training": {
            "output_dir": str(folder / "outputs"),
            "log_file": str(folder / "distillation.log"),
            "logging_steps": 1,
            "save_steps": 2,
            "save_total_limit": None,
            "use_tensorboard": False,
        },
        "non_policy_distillation": {
            "num_epochs": 2,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "top_k": 8,
            "max_new_tokens": 24,
        },
        "policy_distillation": {
            "num_epochs": 2,
            "batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "top_k": 8,
            "max_new_tokens": 12,
        },
        "evaluation": {"verifier": "final_answer", "problems": 4, "max_new_tokens": 24, "show": 1},
        "teacher": {"endpoint": endpoint, "patience": 5},
    }
    for name, section in sections.items():
        values[name] = values[name] | section
    return Config.model_validate(values)


@pytest.fixture
def go(pair_teacher: dict[str, Any], tmp_path: Path) -> Run:
    """Runs a stage below tmp_path and gives what the console showed."""

    def start(stage: str = "all", student: Path | None = None, **sections: dict[str, Any]) -> str:
        shown = io.StringIO()
        config = settings(tmp_path, pair_teacher["grpc"], **sections)
        run(config, stage, student, Console(file=shown, width=200))
        return shown.getvalue()

    return start


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path, tolerance: float = 1e-6) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert float((tensor - second[name]).abs().max()) <= tolerance, name


def test_both_stages_leave_the_documented_folders(go: Run, tmp_path: Path) -> None:
    shown = go(training={"use_tensorboard": True})
    for row in ("teacher", "student before", "after stage 1", "after stage 2"):
        assert row in shown
    outputs = tmp_path / "outputs"
    first, second = outputs / "non_policy_distillation", outputs / "policy_distillation"
    folders = [first / n for n in ("best_model", "final_model", "checkpoint-2", "checkpoint-8")]
    folders += [second / n for n in ("best_policy_model", "final_policy_model", "policy_checkpoint-4")]
    for folder in folders:
        for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
            assert (folder / name).is_file(), folder / name
        assert (folder / "generation_config.json").is_file()
        about = json.loads((folder / "training_config.json").read_text())
        assert about["config"]["policy_distillation"]["top_k"] == 8
        assert about["teachers"][0]["fingerprint"]
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()
        assert AutoTokenizer.from_pretrained(folder).chat_template
    assert not list(outputs.rglob(".staging"))
    assert list((first / "runs").glob("events*"))
    assert (first / "responses.parquet" / "part-00000.parquet").is_file()
    rows = json.loads((outputs / "summary.json").read_text())["rows"]
    assert [r["model"] for r in rows] == ["teacher", "student before", "after stage 1", "after stage 2"]
    assert all(key in rows[3] for key in ("accuracy_thinking", "accuracy_non_thinking", "forward_kl", "reverse_kl"))
    assert rows[2]["forward_kl"] < rows[1]["forward_kl"]
    assert (outputs / "summary.md").read_text().startswith("| model |")
    log = (tmp_path / "distillation.log").read_text()
    assert "stage 1, off-policy step 1/8: loss" in log
    assert "stage 2, on-policy step 4/4: loss" in log


FULL = {"distribution": "full"}


def test_both_stages_train_on_the_whole_distribution(go: Run, tmp_path: Path) -> None:
    cache = {"cache_dir": str(tmp_path / "cache")}
    sections = {"non_policy_distillation": FULL, "policy_distillation": FULL, "evaluation": {"batch_size": 3}}
    shown = go(**sections, teacher=cache)
    assert "exact, over the whole vocabulary" in shown
    outputs = tmp_path / "outputs"
    rows = json.loads((outputs / "summary.json").read_text())["rows"]
    assert rows[2]["forward_kl"] < rows[1]["forward_kl"]
    assert rows[0]["tail_share"] == rows[2]["tail_share"] == 0
    log = (tmp_path / "distillation.log").read_text()
    assert "full distribution: 896 bytes a token on the wire" in log
    assert not list(outputs.rglob("scores-0.bin")), "hidden states are not kept"
    (kept,) = (tmp_path / "cache" / "heads").iterdir()
    about = json.loads((kept / "about.json").read_text())
    assert about["dtype"] == "float32"
    before = (kept / "about.json").stat().st_mtime_ns
    go("policy", policy_distillation=FULL | {"max_steps": 1}, teacher=cache)
    assert (kept / "about.json").stat().st_mtime_ns == before, "the second run fetched the head again"


@pytest.mark.parametrize("transport", ["grpc", "http"])
@pytest.mark.parametrize("stage", ["non_policy", "policy"])
def test_the_first_step_on_the_whole_distribution_is_that_on_a_top_k_of_the_whole_vocabulary(
    pair_teacher: dict[str, Any], tmp_path: Path, transport: str, stage: str
) -> None:
    name = "non_policy_distillation" if stage == "non_policy" else "policy_distillation"
    found = []
    for options in (FULL, {"top_k": 305}):
        folder = tmp_path / str(len(found))
        teacher = {"endpoint": pair_teacher[transport], "cache_dir": str(folder)}
        config = settings(folder, "", teacher=teacher, **{name: options | {"max_steps": 1}})
        run(config, stage, None, Console(file=io.StringIO()))
        state = json.loads(next((folder / "outputs" / name).rglob("trainer_state.json")).read_text())
        found.append(state["log_history"][0])
    assert found[0]["soft_loss"] > 0.1
    for metric in ("loss", "soft_loss", "forward_kl", "reverse_kl", "grad_norm"):
        assert found[0][metric] == pytest.approx(found[1][metric], abs=1e-5, rel=1e-5), metric


def test_an_epoch_asks_the_teacher_only_for_what_no_epoch_before_asked(
    go: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores: list[score_store.ScoreStore] = []
    opened = score_store.ScoreStore.__init__

    def remember(self: score_store.ScoreStore, *arguments: Any, **options: Any) -> None:
        opened(self, *arguments, **options)
        stores.append(self)

    monkeypatch.setattr(score_store.ScoreStore, "__init__", remember)
    go("non_policy", non_policy_distillation={"num_epochs": 3})
    assert [store.asked for store in stores] == [8, 32], "the held-out answers once, the responses once"


@pytest.mark.parametrize("stage", ["non_policy", "policy"])
def test_a_run_that_goes_on_ends_with_the_weights_of_one_that_never_stopped(
    go: Run, tmp_path: Path, stage: str
) -> None:
    name = {"non_policy": "non_policy_distillation", "policy": "policy_distillation"}[stage]
    final = {"non_policy": "final_model", "policy": "final_policy_model"}[stage]
    prefix = {"non_policy": "checkpoint", "policy": "policy_checkpoint"}[stage]
    steps = {"save_steps": 3}
    go(stage, training=steps, policy_distillation={"num_epochs": 4})
    folder = tmp_path / "outputs" / name
    shutil.copytree(folder, tmp_path / "whole")
    for path in folder.iterdir():
        if path.is_dir() and path.name not in (f"{prefix}-3", "responses.parquet"):
            shutil.rmtree(path)
    shown = go(stage, training=steps | {"resume": True}, policy_distillation={"num_epochs": 4})
    assert f"going on from {folder / f'{prefix}-3'}" in shown
    assert "step 3/8" not in shown
    assert "step 4/8" in shown
    assert_same_weights(folder / final, tmp_path / "whole" / final)
    again = go(stage, training=steps | {"resume": True}, policy_distillation={"num_epochs": 4})
    assert "is finished, going on after it" in again


def test_a_fresh_run_moves_the_old_folder_aside_and_says_so(go: Run, tmp_path: Path) -> None:
    options = {"max_steps": 1}
    go("policy", policy_distillation=options)
    shown = go("policy", policy_distillation=options)
    assert "moved it to" in shown
    assert (tmp_path / "outputs" / "policy_distillation.1" / "final_policy_model").is_dir()


@pytest.mark.slow
def test_any_folder_of_a_run_can_be_started_from(go: Run, tmp_path: Path) -> None:
    go("non_policy", non_policy_distillation={"max_steps": 2})
    folder = tmp_path / "outputs" / "non_policy_distillation"
    for name in ("best_model", "final_model", "checkpoint-2"):
        shown = go("policy", folder / name, policy_distillation={"max_steps": 1})
        assert f"student {folder / name}" in shown.replace("\n", "")
    (folder / "best_model").rename(folder / ".best_model.old")  # as where a kill meets its replacement
    assert "stage 1's best model" in go("policy", policy_distillation={"max_steps": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "forward_kl"},
        {"loss": "jsd", "t_squared": True},
        {"loss": "policy_gradient"},
        {"loss": "policy_gradient", "sampling_temperature": 1.0},
        {"support": "student"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_every_loss_of_stage_2_trains(go: Run, tmp_path: Path, options: dict[str, Any]) -> None:
    go("policy", policy_distillation={"max_steps": 2, **options})
    final = tmp_path / "outputs" / "policy_distillation" / "final_policy_model"
    start, end = weights(STUDENT), weights(final)
    assert any(not torch.equal(end[name], start[name]) for name in start)
    assert all(torch.isfinite(t).all() for t in end.values())


@pytest.mark.parametrize("options", [{"alpha": 0.0, "beta": 1.0}, {"loss": "jsd", "modes": "mixed"}])
def test_stage_1_trains_in_its_other_ways(go: Run, tmp_path: Path, options: dict[str, Any]) -> None:
    go("non_policy", non_policy_distillation={"max_steps": 2, **options})
    assert (tmp_path / "outputs" / "non_policy_distillation" / "final_model").is_dir()


def test_responses_of_an_earlier_run_are_reused(go: Run, tmp_path: Path) -> None:
    go("non_policy", non_policy_distillation={"max_steps": 1})
    path = tmp_path / "outputs" / "non_policy_distillation" / "responses.parquet"
    kept = tmp_path / "kept.parquet"
    path.rename(kept)
    shown = go("non_policy", non_policy_distillation={"max_steps": 1, "dataset_path": str(kept)})
    assert "asked the teacher for" not in shown
    assert "32 responses of the teacher" in shown
    assert not path.exists()


def test_without_held_out_problems_the_last_model_is_the_best(go: Run, tmp_path: Path) -> None:
    shown = go("policy", data={"val_path": None, "val_ratio": 0.0}, policy_distillation={"max_steps": 1})
    assert "nothing is held out" in shown
    folder = tmp_path / "outputs" / "policy_distillation"
    assert_same_weights(folder / "best_policy_model", folder / "final_policy_model", 0.0)


def test_an_unknown_training_argument_is_refused_with_the_nearest(go: Run) -> None:
    with pytest.raises(UserError, match="did you mean adam_beta1"):
        go("policy", training={"extra": {"adam_beta_1": 0.8}})


def test_a_loss_that_is_no_number_stops_before_the_weights_change(
    go: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(STUDENT, broken)
    tensors = weights(broken)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float("nan"))
    model = AutoModelForCausalLM.from_pretrained(STUDENT)
    model.load_state_dict(tensors, strict=False)
    model.save_pretrained(broken)
    where = (
        r"the loss of step 1 is not finite \(nan\), in the batch of \w+ \((non_)?thinking\).*there is no checkpoint yet"
    )
    with pytest.raises(UserError, match=where):
        go("non_policy", broken, data={"val_path": None, "val_ratio": 0.0})
    assert not list((tmp_path / "outputs" / "non_policy_distillation").glob("checkpoint-*"))


def test_a_gradient_that_is_no_number_stops_before_the_weights_change_and_names_the_batch(
    go: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute, seen = DistillationTrainer.compute_loss, list[DistillationTrainer]()

    def steep(self: DistillationTrainer, *arguments: Any, **options: Any) -> torch.Tensor:
        seen[:] = [self]
        loss = compute(self, *arguments, **options)
        return loss if self.state.global_step < 2 else loss * float("inf")

    monkeypatch.setattr(DistillationTrainer, "compute_loss", steep)
    clipping = {"save_steps": 1, "max_grad_norm": 0.0}  # nobody asks for the norm then
    pattern = r"the gradient of step 3 is not finite \((nan|inf)\), in the batch of \w+ .*checkpoint-2 is whole"
    with pytest.raises(UserError, match=pattern):
        go("non_policy", training=clipping, non_policy_distillation={"max_steps": 4})
    kept = tmp_path / "outputs" / "non_policy_distillation" / "checkpoint-2"
    assert fault(kept) is None
    now = seen[0].model.state_dict()
    assert all(torch.equal(tensor, now[name]) for name, tensor in weights(kept).items())


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file of this process may grow beyond `size` bytes: the system refuses the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_saving_is_said_and_training_goes_on(
    go: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = DistillationTrainer._save_checkpoint
    sizes = {2: 100_000, 3: 700_000}  # step 2: not even the weights fit; step 3: the optimizer's states do not

    def cramped(self: DistillationTrainer, *arguments: Any) -> None:
        with room(sizes.get(self.state.global_step, 2**40)):
            save(self, *arguments)

    monkeypatch.setattr(DistillationTrainer, "_save_checkpoint", cramped)
    go("policy", policy_distillation={"num_epochs": 2}, training={"save_steps": 1})
    folder = tmp_path / "outputs" / "policy_distillation"
    kept = sorted(p.name for p in folder.glob("policy_checkpoint-*"))
    assert kept == ["policy_checkpoint-1", "policy_checkpoint-4"]
    assert all(fault(folder / name) is None for name in kept)
    assert damage(folder / "final_policy_model") is None
    assert not (folder / ".staging").exists()
    lines = [x for x in (tmp_path / "distillation.log").read_text().splitlines() if "could not be written" in x]
    assert len(lines) == 2
    for step, line in zip((2, 3), lines, strict=True):
        pattern = rf"step {step} could not be written: the disk is full after [\d,]+ bytes, [\d,]+ are free in \S+, "
        assert re.search(pattern + r"a checkpoint takes about [\d,]+; \S+checkpoint-1 is whole, training goes on", line)


def test_a_full_disk_keeps_the_older_best_model_and_ends_a_run_whose_final_model_does_not_fit(
    go: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = DistillationTrainer.save_to

    def cramped(self: DistillationTrainer, folder: Path, *arguments: Any, **options: Any) -> bool:
        with room(100_000):
            return save(self, folder, *arguments, **options)

    folder = tmp_path / "outputs" / "policy_distillation"
    monkeypatch.setattr(DistillationTrainer, "save_to", cramped)
    with pytest.raises(UserError, match=r"the disk is full after [\d,]+ bytes.*--resume"):
        go("policy", policy_distillation={"max_steps": 2})
    assert sorted(p.name for p in folder.glob("*model")) == []
    monkeypatch.setattr(DistillationTrainer, "save_to", save)
    assert "going on from" in go("policy", policy_distillation={"max_steps": 2}, training={"resume": True})
    assert damage(folder / "final_policy_model") is None


def test_a_checkpoint_of_another_teacher_is_not_continued(go: Run, tmp_path: Path) -> None:
    go("policy", policy_distillation={"max_steps": 2})
    about = tmp_path / "outputs" / "policy_distillation" / "policy_checkpoint-2" / "training_config.json"
    value = json.loads(about.read_text())
    (teacher,) = value.pop("teachers")
    old = {
        "name": teacher["name"],
        "fingerprint": teacher["fingerprint"],
    }  # as once written
    shutil.rmtree(about.parent.parent / "final_policy_model")
    for fingerprint in ("other", old["fingerprint"]):
        about.write_text(json.dumps(value | {"teacher": old | {"fingerprint": fingerprint}}))
        seal(about.parent)
        if fingerprint == "other":
            with pytest.raises(UserError, match="trained with teacher other"):
                go("policy", policy_distillation={"max_steps": 2}, training={"resume": True})
    assert "going on from" in go("policy", policy_distillation={"max_steps": 2}, training={"resume": True})


def test_the_test_stage_shows_answers_of_both_models(go: Run) -> None:
    shown = go("test")
    parts = dict(part.split(" \n", 1) for part in shown.split("\n── ")[1:])
    assert {"student", "teacher", "score", "thinking", "non-thinking", "what training will meet"} == parts.keys()
    for mode in ("thinking", "non-thinking"):
        assert all(f"\n  {who} (" in parts[mode] for who in ("student", "teacher"))


def test_stage_1_gives_the_same_weights_however_its_batch_is_split(go: Run, tmp_path: Path) -> None:
    """Plain SGD without clipping, so that the weights show the gradient's scale itself."""
    extra = {"optim": "sgd"}
    common = {"max_grad_norm": 0.0, "extra": extra, "lr_scheduler_type": "constant", "warmup_ratio": 0.0}
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        stage = {"batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 2, "learning_rate": 0.1}
        go("non_policy", training=common, non_policy_distillation=stage)
        folder = tmp_path / f"split-{batch}"
        shutil.copytree(tmp_path / "outputs" / "non_policy_distillation" / "final_model", folder)
        found.append(folder)
    assert_same_weights(found[0], found[1])
    moved = max(float((weights(found[0])[n] - t).abs().max()) for n, t in weights(STUDENT).items())
    assert moved > 1e-3
    assert np.isfinite(moved)


def test_the_order_in_which_responses_arrived_changes_nothing(go: Run, tmp_path: Path) -> None:
    go("non_policy")
    first = tmp_path / "outputs" / "non_policy_distillation"
    (part,) = sorted((first / "responses.parquet").glob("*.parquet"))
    table = parquet.read_table(part)
    other = tmp_path / "reversed.parquet"
    parquet.write_table(table.take(list(range(len(table)))[::-1]), other)
    go(
        "non_policy",
        training={"output_dir": str(tmp_path / "two")},
        non_policy_distillation={"dataset_path": str(other)},
    )
    assert_same_weights(first / "final_model", tmp_path / "two" / "non_policy_distillation" / "final_model", 0.0)
