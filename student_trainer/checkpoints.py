"""The layout of the output folder, and how a model folder gets there whole.

    outputs/non_policy_distillation/{best_model, final_model, checkpoint-N}
    outputs/policy_distillation/{best_policy_model, final_policy_model, policy_checkpoint-N}

Each of these is a model folder (weights, config.json, tokenizer, chat template, generation_config.json) with a
`training_config.json`: the resolved configuration, the stage, the step, the teacher and the last measurements. A
checkpoint also holds optimizer, schedule, random states and trainer_state.json. Everything is written beside its
place, sealed with a manifest (manifest.py), flushed to the disk and moved to its place in one step.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .manifest import damage, seal
from .storage import keep_aside, recover_folder, remove_folder, replace_folder, write_json

log = logging.getLogger(__name__)

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
        """(step, folder) of every checkpoint, whole or not, oldest first."""
        pattern = re.compile(re.escape(self.checkpoint) + r"-(\d+)")
        names = ((pattern.fullmatch(p.name), p) for p in self.root.glob(f"{self.checkpoint}-*"))
        return sorted((int(m[1]), p) for m, p in names if m and p.is_dir())

    def newest_whole(self, *, contents: bool = True) -> Path | None:
        """The newest checkpoint that training can go on from. Those that are passed over are named in the log."""
        for _, folder in reversed(self.checkpoints()):
            wrong = fault(folder, contents=contents)
            if wrong is None:
                return folder
            log.warning("passing over %s: %s", folder, wrong)
        return None


def off_policy_layout(output_dir: str) -> Layout:
    """Stage 1's folders."""
    root = Path(output_dir) / "non_policy_distillation"
    return Layout(root, "non_policy", "best_model", "final_model", "checkpoint")


def on_policy_layout(output_dir: str) -> Layout:
    """Stage 2's folders."""
    root = Path(output_dir) / "policy_distillation"
    return Layout(root, "policy", "best_policy_model", "final_policy_model", "policy_checkpoint")


def fault(checkpoint: Path, *, contents: bool = True) -> str | None:
    """Why training cannot go on from this folder, or None where it can; `contents`: read and hash every file."""
    for name in (STATE, ABOUT):
        if not (checkpoint / name).is_file():
            return f"{name} is missing"
    return damage(checkpoint, contents=contents)


def read_about(folder: Path) -> dict[str, Any]:
    """The `training_config.json` of a model folder; empty where there is none."""
    path = folder / ABOUT
    if not path.is_file():
        return {}
    about: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return about


def prepare(layout: Layout, resume: bool | str) -> tuple[Path | None, Path | None]:
    """(checkpoint to go on from, folder that older results were moved to); either may be None.

    Without `resume`, what an earlier run left is renamed, never overwritten. With it, the newest whole checkpoint is
    taken. What a crash left in the staging folder is cleared away, a replacement that it cut short is undone. A path as
    `resume` names a checkpoint of this stage; one of the other stage is left to that stage.
    """
    recover(layout)
    aside = None if resume else keep_aside(layout.root)
    layout.root.mkdir(parents=True, exist_ok=True)
    if isinstance(resume, str):
        return _named(layout, Path(resume)), None
    return (layout.newest_whole() if resume else None), aside


def recover(layout: Layout) -> None:
    """Clears what a run that was killed left half-done."""
    shutil.rmtree(layout.staging, ignore_errors=True)
    for old in layout.root.glob(".*.old"):
        recover_folder(old.with_name(old.name[1 : -len(".old")]))


def _named(layout: Layout, folder: Path) -> Path | None:
    if not folder.is_dir():
        raise UserError(f"no such checkpoint: {folder}", "training.resume", "name a checkpoint folder, or true")
    if wrong := fault(folder):
        step = f"name a whole {layout.checkpoint}-N folder, or start from its weights with --pretrained_student"
        raise UserError(f"training cannot go on from {folder}: {wrong}", "training.resume", step)
    stage = read_about(folder).get("stage")
    return folder if stage == layout.stage else None


def is_finished(layout: Layout, resume: bool | str) -> bool:
    """Whether a run that goes on may skip this stage; a checkpoint named outright is always gone on from."""
    if resume is not True:
        return False
    recover(layout)
    if not layout.final_model.is_dir():
        return False
    wrong = damage(layout.final_model)
    if wrong is not None:
        log.warning("%s is written again: %s", layout.final_model, wrong)
    return wrong is None


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Adds `training_config.json` to a model folder."""
    write_json(folder / ABOUT, about)


def put(written: Path, target: Path) -> None:
    """Seals the folder `written` and moves it to `target`, in place of what is there."""
    seal(written)
    replace_folder(written, target)


def rotate(layout: Layout, keep: int | None, newest: Path) -> None:
    """Removes the oldest whole checkpoints until `keep` are left; `newest`, which was just written, always stays.

    Damaged ones do not count and are left to the user.
    """
    if keep is None:
        return
    whole = [folder for _, folder in layout.checkpoints() if folder != newest and fault(folder, contents=False) is None]
    for folder in whole[: len(whole) + 1 - max(keep, 1)]:
        remove_folder(folder, layout.staging)
