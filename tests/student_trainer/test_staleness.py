"""Rollouts that are older than the step that trains on them: when they are asked about, how they weigh, how a run with
them is logged, interrupted and refused.
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from student_trainer import history
from student_trainer.checkpoints import on_policy_layout
from student_trainer.config import PolicyDistillation
from student_trainer.distillation_trainer import DistillationTrainer
from student_trainer.manifest import seal
from student_trainer.on_policy import RolloutFeed
from student_trainer.run import run
from student_trainer.schedule import Step
from tests.student_trainer.test_stages import Run, assert_same_weights, settings

STEPS = {"num_epochs": 2, "gradient_accumulation_steps": 2, "batch_size": 4, "max_new_tokens": 8}
"""Two epochs of two steps."""


@pytest.fixture
def go(pair_teacher: dict[str, Any], tmp_path: Path) -> Run:
    """Runs stage 2 below tmp_path, with nothing held out, and gives what the console showed."""

    def start(training: dict[str, Any] | None = None, **sections: dict[str, Any]) -> str:
        shown = io.StringIO()
        data = {"val_path": None, "val_ratio": 0.0}
        config = settings(tmp_path, pair_teacher["grpc"], **sections, data=data, training=training or {})
        run(config, "policy", None, Console(file=shown, width=200))
        return shown.getvalue()

    return start


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happened: a step's rollouts were asked about, a micro-batch began to train."""
    found: list[str] = []
    announce, compute = RolloutFeed.announce, DistillationTrainer.compute_loss

    def announced(self: RolloutFeed, step: Step) -> None:
        announce(self, step)
        found.append(f"asked {step.number}")

    def trained(self: DistillationTrainer, *arguments: Any, **options: Any) -> Any:
        found.append(f"train {self.state.global_step}")
        return compute(self, *arguments, **options)

    monkeypatch.setattr(RolloutFeed, "announce", announced)
    monkeypatch.setattr(DistillationTrainer, "compute_loss", trained)
    return found


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_rollouts_are_asked_about_that_many_steps_early_over_the_ends_of_epochs_too(
    go: Run, events: list[str], staleness: int
) -> None:
    go(policy_distillation=STEPS | {"max_staleness": staleness})
    first: dict[str, int] = {}
    for place, event in enumerate(events):
        first.setdefault(event, place)
    assert sorted(first) == [f"{what} {n}" for what in ("asked", "train") for n in range(4)]
    for n in range(4):
        assert first[f"asked {min(3, n + staleness)}"] < first[f"train {n}"]
        if n + staleness + 1 < 4:
            assert first[f"train {n}"] < first[f"asked {n + staleness + 1}"], "older than it may be"


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "forward_kl"},
        {"loss": "jsd", "distribution": "full"},
        {"loss": "policy_gradient", "sampling_temperature": 1.0},
        {"support": "student"},
    ],
    ids=lambda o: "-".join(map(str, o.values())),
)
def test_every_kind_of_loss_trains_on_old_rollouts_and_logs_their_weight(
    go: Run,
    tmp_path: Path,
    options: dict[str, Any],
) -> None:
    cache = {"cache_dir": str(tmp_path / "cache")}
    go(policy_distillation=STEPS | {"max_staleness": 1} | options, teacher=cache)
    lines = [x for x in history.read(on_policy_layout(str(tmp_path / "outputs")).root) if "loss" in x]
    weights = [x["importance_weight"] for x in lines]
    assert len(weights) == 4
    if options.get("sampling_temperature") is None:
        assert weights[0] == pytest.approx(1, abs=1e-4), "the first rollouts are of the student that trains on them"
        assert abs(weights[2] - 1) > 1e-4
    assert all(0 < w <= 2 for w in weights)


def test_fresh_rollouts_are_not_weighed_and_the_parts_of_a_step_are_its_time(go: Run, tmp_path: Path) -> None:
    go(policy_distillation=STEPS, training={"save_steps": 1})
    lines = [x for x in history.read(on_policy_layout(str(tmp_path / "outputs")).root) if "loss" in x]
    for line in lines:
        assert "importance_weight" not in line
        parts = [line[f"seconds_{name}"] for name in ("sampling", "teacher", "training", "saving")]
        assert min(parts) >= 0
        busy = sum(parts) - line["seconds_saving"]
        assert line["completion_tokens"] / line["tokens_per_second"] == pytest.approx(busy, rel=1e-6)
    assert lines[1]["seconds_saving"] > 0


def test_a_checkpoint_without_what_was_in_flight_is_gone_on_from(go: Run, tmp_path: Path) -> None:
    options = STEPS | {"max_staleness": 1}
    go(policy_distillation=options, training={"save_steps": 2})
    layout = on_policy_layout(str(tmp_path / "outputs"))
    shutil.copytree(layout.final_model, tmp_path / "whole")
    kept = layout.checkpoint_folder(2)
    for folder in layout.root.iterdir():
        if folder.is_dir() and folder != kept:
            shutil.rmtree(folder)
    resumed = {"save_steps": 2, "resume": True}
    assert (kept / "in_flight-0.safetensors").is_file()
    assert "going on from" in go(policy_distillation=options, training=resumed)
    assert_same_weights(layout.final_model, tmp_path / "whole", 1e-6)
    shutil.rmtree(layout.final_model)
    shutil.rmtree(layout.checkpoint_folder(4))
    (kept / "in_flight-0.safetensors").unlink()
    (kept / "manifest.json").unlink()
    seal(kept)
    assert "going on from" in go(policy_distillation=options, training=resumed)
    about = json.loads((layout.final_model / "training_config.json").read_text())
    assert about["step"] == 4


def test_prefixes_of_another_temperature_are_refused_with_both() -> None:
    with pytest.raises(ValidationError, match=r"loss's temperature 2\.0, sampling_temperature is 1\.0"):
        PolicyDistillation(max_staleness=1, sampling_temperature=1.0)
    for options in ({"loss": "policy_gradient"}, {"support": "student"}, {"temperature": 1.0}):
        PolicyDistillation(max_staleness=1, sampling_temperature=1.0, **options)  # type: ignore[arg-type]
