"""Kills a trainer with SIGKILL at random moments of its saving, again and again, and says whether it always goes on.

    python -m tests.student_trainer.kill_saving --kills 50 FOLDER

The trainer is the real one on a tiny student with dropout, with a feed that needs no teacher. It writes a checkpoint
and the best model after every step. Each child is forked, so that a trial takes no start-up. A trial fails where a
child begins before the last step that was reported as saved. At the end the weights must be those of a run that was
never killed, bit by bit. Prints one line of JSON; exit status 1 where a trial failed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from student_trainer.batches import Row, pad
from student_trainer.checkpoints import off_policy_layout, prepare, read_about
from student_trainer.config import Config
from student_trainer.distillation_trainer import DistillationTrainer
from student_trainer.evaluation import Measurement
from student_trainer.feed import MicroBatch
from student_trainer.losses import Objective, TeacherTargets
from student_trainer.manifest import damage
from student_trainer.objective_forward import accept_objective
from student_trainer.schedule import Step
from student_trainer.stage_loss import StageLoss
from tests.tiny_qwen3 import make

VOCABULARY = 261
CONFIG = Config().model_dump(mode="json")
Tell = Callable[[str], None]


class RandomFeed:
    """Sequences of six random tokens; the same at each step of every run, as a stage's are."""

    ahead = 0

    def __len__(self) -> int:
        return 64

    def lengths(self) -> list[int]:
        """All alike."""
        return [1] * len(self)

    def announce(self, step: Step) -> None:
        """Nothing to ask for."""

    def take(self, step: Step) -> list[MicroBatch]:
        """Random micro-batches."""
        return [self._batch([self._row(i, step.number) for i in indices]) for indices in step.micro_batches]

    def save(self, folder: Path, step: int) -> None:
        """Nothing is under way."""

    def restore(self, folder: Path) -> None:
        """Nothing was saved."""

    def _row(self, index: int, step: int) -> Row:
        ids = np.random.default_rng((index, step)).integers(VOCABULARY, size=6, dtype=np.int32)
        return Row(ids, 2, f"row {index}")

    def _batch(self, rows: list[Row]) -> MicroBatch:
        tokens = torch.from_numpy(pad(rows, 0).targets)
        none, zeros = torch.zeros((len(tokens), 0)), torch.zeros(len(tokens))
        targets = TeacherTargets(none.long(), none, zeros, zeros, 1.0, tokens, zeros)
        return MicroBatch(rows, lambda: (), lambda scores: targets)


class EveryStep(TrainerCallback):  # type: ignore[misc]
    """Tells what is done, measures after every step, and stops at `last`."""

    def __init__(self, tell: Tell, last: int) -> None:
        self.tell, self.last = tell, last

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Everything that follows in this step is saving."""
        self.tell(f"saving {state.global_step}")
        control.should_evaluate = True
        control.should_training_stop = state.global_step >= self.last

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The checkpoint is there."""
        self.tell(f"saved {state.global_step}")


def make_trainer(folder: Path, student: Path, last: int, tell: Tell) -> DistillationTrainer:
    """The trainer of a run below `folder`."""
    layout = off_policy_layout(str(folder))
    about = {"stage": layout.stage, "teacher": {"name": "none", "fingerprint": "none"}, "config": CONFIG}
    args = TrainingArguments(
        output_dir=str(layout.root),
        per_device_train_batch_size=4,
        max_steps=10**6,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_strategy="no",
        save_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    torch.manual_seed(1)
    return DistillationTrainer(
        accept_objective(AutoModelForCausalLM.from_pretrained(student, attention_dropout=0.1)),
        args,
        RandomFeed(),
        StageLoss(Objective("forward_kl", alpha=0.0, beta=1.0), 1.0, 0, VOCABULARY),
        layout=layout,
        tokenizer=AutoTokenizer.from_pretrained(student),
        evaluator=lambda model: Measurement({"loss": 1 / time.time()}, []),
        about=lambda step, measured: about | {"step": step, "measured": measured},
        save_total_limit=2,
        callbacks=[EveryStep(tell, last)],
    )


def train(folder: Path, student: Path, last: int, tell: Tell) -> None:
    """Goes on from what is below `folder` to step `last`, then writes the final model."""
    layout = off_policy_layout(str(folder))
    checkpoint, _ = prepare(layout, True)
    if layout.best_model.is_dir():
        assert damage(layout.best_model) is None, "the best model is not whole"
    trainer = make_trainer(folder, student, last, tell)
    tell(f"began {read_about(checkpoint)['step'] if checkpoint else 0}")
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.save_to(layout.final_model, {})
    tell("finished 0")


@contextmanager
def child(folder: Path, student: Path, last: int) -> Iterator[tuple[int, Iterator[tuple[str, int]]]]:
    """A forked trainer: its process id and what it tells. It has ended when the block has."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    number = os.fork()
    if number == 0:
        try:
            os.close(reader)
            train(folder, student, last, lambda text: (os.write(writer, f"{text}\n".encode()), None)[1])
        except BaseException:  # noqa: BLE001 - a forked child must not run on in its parent's code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        yield number, ((word, int(step)) for word, step in (line.split() for line in told if line.endswith("\n")))
    os.waitpid(number, 0)


def kill_once(folder: Path, student: Path, chance: random.Random, seconds: float) -> tuple[int, int, bool, float]:
    """(step that the child began at, last step it said was saved, killed while saving, seconds that saving took)."""
    wait, seen = chance.randrange(1, 4), 0
    began, saved, started, saving = -1, -1, 0.0, False
    with child(folder, student, 10**6) as (number, told):
        for word, step in told:
            if word == "began":
                began = step
            elif word == "saved":
                saved, saving, seconds = step, False, time.monotonic() - started
            else:
                started, saving, seen = time.monotonic(), True, seen + 1
                if seen == wait:
                    time.sleep(chance.uniform(0, seconds))
                    os.kill(number, signal.SIGKILL)
                    break
        for word, step in told:
            if word == "saved":
                saved, saving = step, False
    return began, saved, saving, seconds


def run(folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills `kills` times, then finishes and compares with a run that was not killed."""
    chance, student = random.Random(seed), make(folder / "student")
    least, resumed, while_saving, seconds = 0, 0, 0, 0.1
    for _ in range(kills):
        began, saved, saving, seconds = kill_once(folder / "killed", student, chance, seconds)
        resumed += began >= least
        while_saving += saving
        least = max(least, began, saved)
    for name in ("killed", "whole"):
        with child(folder / name, student, least + 3) as (_, told):
            words = [word for word, _ in told]
            assert words[-1:] == ["finished"], f"{name}: {words[-3:]}"
    ends = [
        load_file(off_policy_layout(str(folder / n)).final_model / "model.safetensors") for n in ("killed", "whole")
    ]
    equal = all(torch.equal(ends[0][name], ends[1][name]) for name in ends[1])
    left = [p.name for p in (folder / "killed").rglob(".*")]
    return {
        "kills": kills,
        "resumed": resumed,
        "killed_while_saving": while_saving,
        "steps": least + 3,
        "equal_weights": equal,
        "leftovers": left,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="emptied first")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    torch.set_num_threads(1)
    found = run(options.folder, options.kills, options.seed)
    print(json.dumps(found))
    return 0 if found["resumed"] == found["kills"] and found["equal_weights"] and not found["leftovers"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
