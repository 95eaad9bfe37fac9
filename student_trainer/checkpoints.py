"""The layout of the output folder, and how a model folder gets there whole.

    outputs/non_policy_distillation/{best_model, final_model, checkpoint-N}
    outputs/policy_distillation/{best_policy_model, final_policy_model, policy_checkpoint-N}

Each of these is a model folder (weights, config.json, tokenizer, chat template, generation_config.json) with a
`training_config.json`: the resolved configuration, the stage, the step, the teacher and the last measurements. A
checkpoint also holds optimizer, schedule, random states and trainer_state.json. Everything is written beside its
place and moved there in one step.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .storage import keep_aside, recover_folder, write_json

ABOUT = "training_config.json"
STATE = "trainer_state.json"


@dataclass(frozen=True)
class Layout:
    """Names of one stage's folders below `root`."""

    root: Path
    stage: str
    best: str
    final: str
    checkpoint: str

    @property
    def best_model(self) -> Path:
        """The model with the smallest validation loss."""
        return self.root / self.best

    @property
    def final_model(self) -> Path:
        """The model after the last step; it is there once the stage has finished."""
        return self.root / self.final

    @property
    def staging(self) -> Path:
        """Where folders are written before they are moved to their places."""
        return self.root / ".staging"

    def checkpoint_folder(self, step: int) -> Path:
        """The checkpoint of `step`."""
        return self.root / f"{self.checkpoint}-{step}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, folder) of every complete checkpoint, oldest first."""
        pattern = re.compile(re.escape(self.checkpoint) + r"-(\d+)")
        names = ((pattern.fullmatch(p.name), p) for p in self.root.glob(f"{self.checkpoint}-*"))
        return sorted((int(m[1]), p) for m, p in names if m and is_complete(p))


def off_policy_layout(output_dir: str) -> Layout:
    """Stage 1's folders."""
    root = Path(output_dir) / "non_policy_distillation"
    return Layout(root, "non_policy", "best_model", "final_model", "checkpoint")


def on_policy_layout(output_dir: str) -> Layout:
    """Stage 2's folders."""
    root = Path(output_dir) / "policy_distillation"
    return Layout(root, "policy", "best_policy_model", "final_policy_model", "policy_checkpoint")


def is_complete(checkpoint: Path) -> bool:
    """Whether training can go on from this folder."""
    return all((checkpoint / name).is_file() for name in (STATE, ABOUT))


def read_about(folder: Path) -> dict[str, Any]:
    """The `training_config.json` of a model folder; empty where there is none."""
    path = folder / ABOUT
    if not path.is_file():
        return {}
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return about


def prepare(layout: Layout, resume: bool | str) -> tuple[Path | None, Path | None]:
    """(checkpoint to go on from, folder that older results were moved to); either may be None.

    Without `resume`, what an earlier run left is renamed, never overwritten. With it, half-written folders are
    cleared away. A path as `resume` names a checkpoint of this stage; one of the other stage is left to that stage.
    """
    if not resume:
        aside = keep_aside(layout.root)
        layout.root.mkdir(parents=True, exist_ok=True)
        return None, aside
    layout.root.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(layout.staging, ignore_errors=True)
    for folder in (layout.best_model, layout.final_model):
        recover_folder(folder)
    if isinstance(resume, str):
        return _named(layout, Path(resume)), None
    found = layout.checkpoints()
    return (found[-1][1] if found else None), None


def _named(layout: Layout, folder: Path) -> Path | None:
    if not folder.is_dir():
        raise UserError(f"no such checkpoint: {folder}", "training.resume", "name a checkpoint folder, or true")
    if not is_complete(folder):
        step = f"name a {layout.checkpoint}-N folder, or start from its weights with --pretrained_student"
        raise UserError(f"{folder} holds no training state to go on from", "training.resume", step)
    stage = read_about(folder).get("stage")
    return folder if stage == layout.stage else None


def is_finished(layout: Layout, resume: bool | str) -> bool:
    """Whether a run that goes on may skip this stage; a checkpoint named outright is always gone on from."""
    return resume is True and (layout.final_model / ABOUT).is_file()


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Adds `training_config.json` to a model folder."""
    write_json(folder / ABOUT, about)


def rotate(layout: Layout, keep: int | None) -> None:
    """Removes the oldest checkpoints beyond `keep`; the newest complete one always stays."""
    if keep is None:
        return
    for _, folder in layout.checkpoints()[: -max(keep, 1)]:
        shutil.rmtree(folder, ignore_errors=True)
