"""Kills a run with SIGKILL at named points of both stages, one after the other, and compares how it ends.

    python -m tests.student_trainer.kill_anywhere FOLDER

A run is never killed. Another is killed at every point of FIRST and SECOND in turn and goes on with --resume each
time; a third does so in stage 2 alone, with rollouts that are a step old. Each child is the real program against a
real server with the theoretical teacher, whose answers do not depend on what they are batched with; it is forked, so
that a trial takes no start-up, and the function at its point is wrapped before the run begins. In the end the weights
of both stages must be the uninterrupted run's, bit by bit. Prints one line of JSON; exit status 1 where a point was
not reached or a weight differs.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from protos.scores import TeacherInfo
from protos.tokenizer_hash import hash_of_template, hash_of_tokenizer
from student_trainer import checkpoints, in_flight, on_policy, responses, run, saving, score_store, teachers
from student_trainer.checkpoints import off_policy_layout, on_policy_layout
from student_trainer.config import Config
from student_trainer.distillation_trainer import DistillationTrainer
from student_trainer.on_policy import RolloutFeed
from student_trainer.saving import SavingTrainer, StepBoundary
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.theoretical_backend import Behaviour, TheoreticalBackend
from tests.servers import ROOT, environment, serving, wait_for
from tests.tiny_qwen3 import make


@dataclass(frozen=True)
class Point:
    """Where a child is killed: `before` (or after) the `nth` call of `owner.name` in it."""

    what: str
    owner: Any
    name: str
    nth: int = 1
    before: bool = True


FIRST = (
    Point("a part of the responses is written", responses, "_write_part", before=False),
    Point("scores are asked for, none is waited for", DistillationTrainer, "compute_loss"),
    Point("waiting for the teacher", score_store.ScoreStore, "_take", 3),
    Point("a score is kept, its index entry is not", score_store, "_write", 6),
    Point("a checkpoint is there, the oldest is not removed", saving, "rotate"),
    Point("mid-accumulation", DistillationTrainer, "compute_loss", 5),
    Point("before the backward pass", DistillationTrainer, "compute_loss", 6, before=False),
    Point("before the optimizer step", StepBoundary, "on_pre_optimizer_step", 2),
    Point("a checkpoint of an epoch's end is there", saving, "rotate", 3),
    Point("after the optimizer step, before the schedule's", AcceleratedOptimizer, "step", before=False),
    Point("at a step's end", StepBoundary, "on_step_end", before=False),
    Point("mid-save: weights without optimizer", SavingTrainer, "_save_optimizer_and_scheduler"),
    Point("mid-save: before the manifest", checkpoints, "seal"),
    Point("mid-save: before the checkpoint has its name", saving, "put"),
    Point("between the stages", on_policy, "distil"),
)
SECOND = (
    Point("during sampling, a part is asked about", RolloutFeed, "_ask", 2),
    Point("sampled, nothing trained", RolloutFeed, "take"),
    Point("waiting for the teacher", teachers.Pending, "result", 4),
    Point("a checkpoint is there, the oldest is not removed", saving, "rotate"),
    Point("mid-accumulation", DistillationTrainer, "compute_loss", 5),
    Point("before the optimizer step", StepBoundary, "on_pre_optimizer_step", 2),
    Point("after the optimizer step, before the schedule's", AcceleratedOptimizer, "step", before=False),
    Point("a checkpoint of an epoch's end is there", saving, "rotate"),
    Point("mid-save: before the feed's part", DistillationTrainer, "save_feed"),
    Point("mid-save: after the feed's part", DistillationTrainer, "save_feed", before=False),
    Point("the final model is about to be written", SavingTrainer, "save_to", 2),
)
STALE = (*SECOND[:8], Point("what was in flight is taken up", in_flight, "load", before=False), *SECOND[8:])
"""SECOND where checkpoints hold rollouts: one step of them, because `max_staleness` is 1."""


class Teacher(TheoreticalBackend):
    """The theoretical teacher, which says that it has the student's tokenizer."""

    def __init__(self, student: Path, behaviour: Behaviour | None = None) -> None:
        super().__init__(BackendOptions(model="theory"), behaviour)
        self.tokenizer = AutoTokenizer.from_pretrained(student)

    @property
    def info(self) -> TeacherInfo:
        """The theoretical teacher's, with the student's hashes."""
        hashes = {
            "tokenizer_hash": hash_of_tokenizer(self.tokenizer),
            "template_hash": hash_of_template(self.tokenizer),
        }
        ends = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        return replace(super().info, **hashes, eos_token_ids=ends)


@contextmanager
def teacher(student: Path) -> Iterator[str]:
    """The address of a `Teacher` in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "address"
        command = [sys.executable, "-m", __spec__.name, "--serve", str(student), str(ready)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE)
        try:
            wait_for(lambda: (ready.exists() and ready.read_text()) or process.poll() is not None)
            yield ready.read_text()
        finally:
            process.communicate()


def serve(student: Path, ready: Path) -> None:
    """Serves until standard input ends."""
    with serving(lambda: Teacher(student)) as server:
        ready.write_text(server.grpc)
        sys.stdin.read()


def config(folder: Path, student: Path, address: str, staleness: int) -> Config:
    """A run below `folder`: 14 steps of stage 1, 10 of stage 2, epochs of 8 and 4, a checkpoint each second step."""
    stage = {"batch_size": 2, "gradient_accumulation_steps": 3, "num_epochs": 3, "learning_rate": 1e-2, "top_k": 8}
    return Config.model_validate(
        {
            "models": {"student_model": str(student), "torch_dtype": "float32", "load_in_4bit": False},
            "data": {
                "data_path": str(student.parent / "examples.json"),
                "max_length": 160,
                "val_ratio": 0.0,
            },
            "training": {
                "output_dir": str(folder / "outputs"),
                "log_file": str(folder / "distillation.log"),
                "logging_steps": 1,
                "save_steps": 2,
                "save_total_limit": 2,
                "use_tensorboard": False,
                "resume": True,
            },
            "non_policy_distillation": stage | {"max_steps": 14, "max_new_tokens": 8},
            "policy_distillation": stage | {"max_steps": 10, "max_new_tokens": 8, "max_staleness": staleness},
            "teacher": {"endpoint": address, "patience": 5},
        }
    )


def make_student(folder: Path) -> Path:
    """A student with dropout, whose random numbers must go on too, and beside it what it is asked."""
    student = make(folder / "student")
    about = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(about | {"attention_dropout": 0.1}))
    examples = [{"instruction": f"Calculate {i}", "output": str(i)} for i in range(24)]
    (folder / "examples.json").write_text(json.dumps(examples))
    return student


def kill_at(point: Point) -> None:
    """From now on this process ends at `point`."""
    function, calls = getattr(point.owner, point.name), 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if point.before and calls == point.nth:
            os.kill(os.getpid(), signal.SIGKILL)
        found = function(*arguments, **options)
        if not point.before and calls == point.nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    setattr(point.owner, point.name, wrapped)


def child(settings: Config, stage: str, point: Point | None) -> int:
    """Runs `stage` in a forked process that ends at `point`; how it ended, as os.waitstatus_to_exitcode says."""
    sys.stdout.flush()
    number = os.fork()
    if number == 0:
        try:
            if point is not None:
                kill_at(point)
            run.run(settings, stage, None, Console(file=io.StringIO()))
        except BaseException:  # noqa: BLE001 - a forked child must not run on in its parent's code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def chain(settings: Config, stage: str, points: tuple[Point, ...]) -> list[str]:
    """Ends a run at each of `points` and then lets it end by itself; the points that were missed."""
    missed = [p.what for p in points if child(settings, stage, p) != -signal.SIGKILL]
    return missed + ([] if child(settings, stage, None) == 0 else ["the end"])


def differing(one: Config, other: Config) -> list[str]:
    """Tensors of the final models that are not the same bits."""
    found = []
    for layout in (off_policy_layout, on_policy_layout):
        ends = [load_file(layout(c.training.output_dir).final_model / "model.safetensors") for c in (one, other)]
        found += [f"{layout.__name__} {n}" for n in ends[0] if not torch.equal(ends[0][n], ends[1][n])]
    return found


def trial(folder: Path) -> dict[str, Any]:
    """All runs; what was killed, missed, and differs."""
    student = make_student(folder)
    gc.collect()
    gc.freeze()  # a child's collections leave out what it has from here
    with teacher(student) as address:
        whole, killed, stale, stale_killed = (
            config(folder / name, student, address, staleness)
            for name, staleness in (("whole", 0), ("killed", 0), ("stale", 1), ("stale-killed", 1))
        )
        missed = chain(whole, "all", ())
        missed += chain(killed, "all", (*FIRST, *SECOND))
        for other in (stale, stale_killed):  # stage 1 is the same
            first = off_policy_layout(other.training.output_dir).root
            shutil.copytree(off_policy_layout(whole.training.output_dir).root, first)
        missed += chain(stale, "policy", ())
        missed += chain(stale_killed, "policy", STALE)
    return {
        "kills": len(FIRST) + len(SECOND) + len(STALE),
        "missed": missed,
        "differing": differing(whole, killed) + differing(stale, stale_killed),
        "same_however_old": not differing(whole, stale),
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="emptied first")
    parser.add_argument("ready", type=Path, nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.folder, options.ready)
        return 0
    shutil.rmtree(options.folder, ignore_errors=True)
    options.folder.mkdir(parents=True)
    torch.set_num_threads(1)
    found = trial(options.folder)
    print(json.dumps(found))
    return 1 if found["missed"] or found["differing"] or found["same_however_old"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
