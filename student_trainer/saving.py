"""How the Trainer of both stages saves: whole folders, a full disk that stops nobody, and a checkpoint before a stop.

The Trainer writes into the staging folder; rank 0 seals what is there and moves it to its place (checkpoints.py). Where
the disk is full meanwhile, all processes learn of it, the half is thrown away, one line says so, and training goes on.
Only a stage's final model must be written. Knows nothing of losses and feeds.
"""

from __future__ import annotations

import logging
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from . import distributed
from .adapters import describe_base
from .checkpoints import Layout, put, rotate, write_about
from .errors import Interrupted, UserError, is_disk_full
from .manifest import size_of
from .model_card import model_card
from .sharding import ShardingTrainer, loading_alone
from .stopping import Stopper

log = logging.getLogger(__name__)


class StepBoundary(TrainerCallback):  # type: ignore[misc]
    """Keeps the random states of the end of each step, and the optimizer step from being broken off."""

    def __init__(self, stopper: Stopper) -> None:
        self.stopper = stopper
        self.states: dict[str, Any] | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """From here on weights, optimizer and schedule are of different steps."""
        self.stopper.hold()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done: from here a run can go on."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
        self.states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
        self.states["cuda"] = cuda
        self.stopper.release()

    def restore(self) -> None:
        """Puts the random states back."""
        assert self.states is not None
        random.setstate(self.states["python"])
        np.random.set_state(self.states["numpy"])
        torch.set_rng_state(self.states["cpu"])
        if self.states["cuda"] is not None:
            torch.cuda.set_rng_state_all(self.states["cuda"])


class SavingTrainer(ShardingTrainer):
    """A Trainer that saves as the module says. `about` is what a model folder's training_config.json says; `complete`
    is called by rank 0 with a model folder, no checkpoint, once all else is in it.
    """

    def __init__(
        self,
        *arguments: Any,
        layout: Layout,
        about: Callable[[int, dict[str, float]], dict[str, Any]],
        save_total_limit: int | None,
        stopper: Stopper | None = None,
        complete: Callable[[Path], None] = lambda folder: None,
        **options: Any,
    ) -> None:
        self.layout, self._about, self._keep, self._complete = layout, about, save_total_limit, complete
        self.stopper = stopper or Stopper()
        self._failures: list[Exception] | None = None
        self._saved_step = -1
        super().__init__(*arguments, **options)
        self._boundary = StepBoundary(self.stopper)
        self.add_callback(self._boundary)

    def measured(self) -> dict[str, float]:
        """What was measured last."""
        return {}

    def save_feed(self, folder: Path) -> None:
        """Adds to a checkpoint what this process's feed needs to go on."""

    def spent_saving(self, seconds: float) -> None:
        """Is told how long each save took."""

    def save_to(self, folder: Path, measured: dict[str, float], *, must: bool = True) -> bool:
        """Writes the model folder `folder`, in place of an older one, in one step; whether it is there.

        UserError where the disk is full and it `must`, else a line in the log.
        """
        staging = self.layout.staging / folder.name
        about = self._about(self.state.global_step, measured)

        def describe() -> None:
            with loading_alone():
                self._complete(staging)
            (staging / "README.md").write_text(model_card(about), encoding="utf-8")

        trouble = self._put(lambda: self.save_model(str(staging), _internal_call=True), describe, folder, about)
        if trouble is None:
            return True
        if must:
            step = "free space or set training.output_dir to another disk, then go on with --resume"
            raise UserError(f"{folder.name} could not be written: {trouble}", str(folder), step)
        log.error("%s could not be written: %s; training goes on", folder, trouble)
        return False

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, target = self.state.global_step, self.layout.checkpoint_folder(self.state.global_step)
        trouble = self._put(
            lambda: self._write_checkpoint(model, trial),
            lambda: os.replace(self.layout.staging / f"checkpoint-{step}", self.layout.staging / target.name),
            target,
            self._about(step, self.measured()),
            lambda: rotate(self.layout, self._keep, target),
        )
        if trouble is None:
            self._saved_step = step
        elif self.args.should_save:
            last = self.layout.newest_whole(contents=False)
            size = f", a checkpoint takes about {size_of(last):,}" if last else ""
            there = f"{last} is whole" if last else "there is none yet"
            text = "the checkpoint of step %d could not be written: %s%s; %s, training goes on and tries again later"
            log.error(text, step, trouble, size, there)

    def _write_checkpoint(self, model: Any, trial: Any) -> None:
        output_dir, strategy = self.args.output_dir, self.args.save_strategy
        # With a strategy of steps the Trainer looks for the best checkpoint beside this one, in the staging folder.
        self.args.output_dir, self.args.save_strategy = str(self.layout.staging), SaveStrategy.NO
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.output_dir, self.args.save_strategy = output_dir, strategy

    def _put(
        self,
        write: Callable[[], None],
        complete: Callable[[], None],
        target: Path,
        about: dict[str, Any],
        afterwards: Callable[[], None] = lambda: None,
    ) -> str | None:
        """All processes `write` into the staging folder, then rank 0 has a folder of `target`'s name there `complete`,
        and that moves to `target`. None, or how full the disk is.

        Every process gets the same answer, after all have written what is theirs.
        """
        started = time.monotonic()
        with self.stopper.held():
            self._failures = []
            try:
                self._unless_full(write)
                full = any(distributed.gather(bool(self._failures)))

                def finish() -> str | None:
                    def move() -> None:
                        complete()
                        write_about(self.layout.staging / target.name, about)
                        put(self.layout.staging / target.name, target)

                    if not full:
                        self._unless_full(move)
                    if full or self._failures:
                        size, free = size_of(self.layout.staging), shutil.disk_usage(self.layout.root).free
                        return f"the disk is full after {size:,} bytes, {free:,} are free in {self.layout.root}"
                    afterwards()
                    return None

                return distributed.on_main(finish)
            finally:
                self._failures = None
                if self.args.should_save:
                    shutil.rmtree(self.layout.staging, ignore_errors=True)
                self.spent_saving(time.monotonic() - started)

    def _unless_full(self, write: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Within a save a full disk is remembered, not raised: the other processes' collective calls must be met."""
        try:
            write(*arguments, **options)
        except Exception as error:
            if self._failures is None or not is_disk_full(error):
                raise
            self._failures.append(error)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer does; see the module for a full disk."""
        self._unless_full(super().save_model, output_dir, _internal_call)
        if self.args.should_save and output_dir is not None and hasattr(self.model, "get_base_model"):
            self._unless_full(describe_base, self.model, Path(output_dir))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self._unless_full(super()._save_optimizer_and_scheduler, output_dir)

    def _save_rng_state(self, output_dir: str) -> None:
        self._unless_full(super()._save_rng_state, output_dir)
        self._unless_full(self.save_feed, Path(output_dir))

    def save_and_stop(self, stop: Interrupted) -> Interrupted:
        """Saves the last step that was finished, as it was at its end, and gives what to raise."""
        self.stopper.saving()
        step = self.state.global_step
        if self._boundary.states is not None and step != self._saved_step:
            if set(distributed.gather(step)) != {step}:
                log.warning("the processes stopped at different steps, no checkpoint is written")
            else:
                self._boundary.restore()
                self._save_checkpoint(self.model_wrapped, None)
        last = distributed.on_main(lambda: self.layout.newest_whole(contents=False))
        saved = f"{last} is saved" if last else "no step was finished, so there is no checkpoint"
        return Interrupted(stop.number, f"stopped at step {step}: {saved}, go on with --resume")
