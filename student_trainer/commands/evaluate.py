"""`python -m student_trainer evaluate`: scores checkpoints in both modes, side by side.

Accuracy by the configured verifier, lengths, and, where a teacher is at hand, divergences from it on its own answers,
all by mode and by domain. Each folder is a model, a checkpoint, or an adapter whose base can be found. Knows how to
open models and show numbers; what is measured is evaluation.py's.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student_trainer.commands.common import add_settings, command_parser, configuration
from student_trainer.config import Config
from student_trainer.errors import UserError

if TYPE_CHECKING:
    from student_trainer.evaluation import Evaluator, Measurement

EPILOG = """\
Without --config, the configuration is the one that the first folder was trained with, where it says so
(training_config.json), so that data, verifier and teacher are those of its run. What the teacher answered in that run
is used again. `evaluation.problems=64` measures on fewer problems."""

ROWS: Sequence[tuple[str, str, str]] = (
    ("accuracy", "accuracy", "{:.1%}"),
    ("finished", "ended by itself", "{:.1%}"),
    ("completion_tokens", "tokens an answer", "{:.1f}"),
    ("forward_kl", "forward KL", "{:.4f}"),
    ("reverse_kl", "reverse KL", "{:.4f}"),
    ("cross_entropy", "cross-entropy", "{:.4f}"),
    ("tail_share", "tail share", "{:.2%}"),
    ("seconds", "seconds", "{:.0f}"),
)
"""Name, label and format of each number; names may end in _MODE or _DOMAIN."""
MODES = ("", "_thinking", "_non_thinking")


def make_parser() -> argparse.ArgumentParser:
    """The command line of `evaluate`."""
    parser = command_parser("evaluate", "Scores models and checkpoints in both modes, side by side.", EPILOG)
    parser.add_argument("--no-teacher", action="store_true", help="measure accuracy alone, and call no teacher")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every number as JSON too")
    parser.add_argument("folders", nargs="+", metavar="DIR", help="folder of a model, a checkpoint or an adapter")
    add_settings(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_intermixed_args(arguments)
    given = [*options.folders, *options.settings]
    settings = [text for text in given if "=" in text and not Path(text).exists()]
    folders = [Path(text) for text in given if text not in settings]
    if not folders:
        raise UserError("no folder is named", "evaluate", "name a model folder or checkpoint before the settings")
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"there is no folder {folder}", "evaluate", "name a model folder or checkpoint")
    if options.out is not None and options.out.is_dir():
        raise UserError(f"{options.out} is a folder", "--out", "name a JSON file")
    config = _configuration(options.config, folders[0], settings)
    evaluate(config, folders, teacher=not options.no_teacher, out=options.out)
    return 0


def _configuration(file: Path | None, folder: Path, settings: Sequence[str]) -> Config:
    """The configuration of `file`, or the one that `folder` was trained with, or the default; adapters are merged."""
    from student_trainer.settings import make_config

    recorded = folder / "training_config.json"
    if file is None and recorded.is_file():
        try:
            kept = json.loads(recorded.read_text(encoding="utf-8")).get("config")
        except (ValueError, AttributeError) as error:
            raise UserError(f"cannot be read: {error}", str(recorded), "name a configuration with --config") from error
        if kept is not None:
            return _plain(make_config(kept, str(recorded), settings, os.environ))
    return _plain(configuration(file, settings))


def _plain(config: Config) -> Config:
    """The configuration for models as they are: whole, merged weights, and a teacher's top-k as the support."""
    models = config.models.model_copy(
        update={"lora_rank": 0, "student_load_in_4bit": False, "student_load_in_8bit": False}
    )
    first = {"alpha": 1.0, "beta": 0.0, "distribution": "top_k", "dataset_path": None}
    second = {"loss": "reverse_kl", "support": "teacher", "distribution": "top_k", "on_policy_share": 1.0}
    return config.model_copy(
        update={
            "models": models,
            "non_policy_distillation": config.non_policy_distillation.model_copy(update=first),
            "policy_distillation": config.policy_distillation.model_copy(update=second),
        }
    )


def evaluate(config: Config, folders: Sequence[Path], *, teacher: bool, out: Path | None) -> None:
    """Measures each folder, shows the numbers side by side, and writes them to `out`."""
    from protos.scores import Mode
    from student_trainer import evaluation
    from student_trainer.data import load_examples
    from student_trainer.models import Description, describe
    from student_trainer.modes import prompt_tokens
    from student_trainer.opening import open_teachers
    from student_trainer.reporting import Reporter, default_console, logging_to
    from student_trainer.stage import training_device
    from student_trainer.verifiers import load_verifier

    console = default_console()
    with ExitStack() as stack:
        stack.enter_context(logging_to(config.training.log_file, console, True))
        reporter = Reporter(console)
        verifier = load_verifier(config.evaluation.verifier)
        if not teacher and verifier is None:
            step = "name a verifier (evaluation.verifier=final_answer), or leave out --no-teacher"
            raise UserError("there is neither a verifier nor a teacher to measure with", "evaluation.verifier", step)
        described: list[Description] = [describe(config, folder) for folder in folders]
        _check_same_tokens(folders, described)
        first = described[0]
        _, problems = load_examples(config.data, config.training.seed, partial(prompt_tokens, first.tokenizer))
        if not problems:
            step = "set data.val_ratio above 0, or name problems with data.val_path"
            raise UserError("no problem is held out to measure on", "data.val_ratio", step)
        rows: list[tuple[str, Measurement]] = []
        if teacher:
            domains = {example.domain for example in problems}
            teachers = open_teachers(config, "non_policy", first, domains, reporter, training_device, stack)
            evaluator = evaluation.Evaluator(config, teachers, first.tokenizer, problems, verifier, reporter)
            stack.callback(evaluator.close)
            rows.append((f"the teacher, {teachers.name}", evaluator.teacher()))
            size = teachers.vocab_size
            measure = partial(_with_teacher, evaluator)
        else:
            pairs = [(e, mode) for e in problems[: config.evaluation.problems] for mode in Mode]
            requests = evaluation.requests_for(first.tokenizer, pairs, config.data.max_length)
            answering = evaluation.Answering(config, requests, verifier)
            size = max(first.tokenizer.get_vocab().values()) + 1
            measure = partial(_alone, answering)
        for name, folder in zip(labels(folders), folders, strict=True):
            rows.append((name, _measured(config, folder, size, measure)))
        count = min(len(problems), config.evaluation.problems)
        show(console, rows, count, config.evaluation.verifier)
    if out is not None:
        write(out, rows, folders, count, config)
        console.print(f"Wrote {out}", markup=False, highlight=False)


def _check_same_tokens(folders: Sequence[Path], described: Sequence[Any]) -> None:
    """UserError where two models would be asked with different tokens."""
    from protos.tokenizer_hash import hash_of_template, hash_of_tokenizer

    found = [(hash_of_tokenizer(d.tokenizer), hash_of_template(d.tokenizer)) for d in described]
    for folder, own in zip(folders, found, strict=True):
        for what, mine, theirs in zip(("tokenizer", "chat template"), own, found[0], strict=True):
            if mine != theirs:
                raise UserError(
                    f"its {what} has the hash {mine or 'none'}, that of {folders[0]} is {theirs or 'none'}",
                    str(folder),
                    "models with different tokens are measured in separate calls",
                )


def _measured(config: Config, folder: Path, vocab_size: int, measure: Any) -> Measurement:
    """Opens the model of `folder`, measures it, and frees what it held."""
    import torch

    from student_trainer.stage import open_student

    student = open_student(config, folder, vocab_size)
    try:
        return measure(student)  # type: ignore[no-any-return]
    finally:
        student.engine.close()
        del student
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _with_teacher(evaluator: Evaluator, student: Any) -> Measurement:
    found = evaluator.student(student, evaluator.plain, on_policy=False)
    if found is None:
        step = "raise data.max_length, which has to hold a prompt and an answer"
        raise UserError("no held-out prompt leaves room for an answer", "data.max_length", step)
    return found


def _alone(answering: Any, student: Any) -> Measurement:
    import time

    from student_trainer.evaluation import Measurement

    started = time.monotonic()
    student.model.eval()
    values, samples = answering.answered_by(student)
    return Measurement({**values, "seconds": time.monotonic() - started}, samples)


def labels(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(set(parts)):
            return names
    return [str(folder) for folder in folders]


def table(rows: Sequence[tuple[str, Measurement]]) -> list[list[str]]:
    """The numbers as text: a row for each number that some model has, its label first, then a cell for each model."""
    found: list[list[str]] = []
    names = {name for _, m in rows for name in m.values}
    for prefix, label, form in ROWS:
        ends = sorted(n.removeprefix(prefix) for n in names if n == prefix or n.startswith(f"{prefix}_"))
        ends.sort(key=lambda end: MODES.index(end) if end in MODES else len(MODES))
        for end in ends:
            # A divergence of nothing may come out a little below 0.
            texts = ("–" if (v := m.values.get(prefix + end)) is None else form.format(v) for _, m in rows)
            cells = [text.replace("-0.0000", "0.0000") for text in texts]
            suffix = f" {end[1:].replace('non_thinking', 'non-thinking')}" if end else ""
            found.append([label + suffix, *cells])
    return found


def show(console: Any, rows: Sequence[tuple[str, Measurement]], problems: int, verifier: str | None) -> None:
    """Prints some answers, and the table."""
    from rich.table import Table

    for name, found in rows:
        for mode, problem, answer in found.samples:
            text = f"{name} | {mode} | {' '.join(problem.split())[:100]} -> {' '.join(answer.split())[:200]}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
    shown = Table("", title="Evaluation")
    for name, _ in rows:
        shown.add_column(name, justify="right", overflow="fold")
    for line in table(rows):
        shown.add_row(*line)
    console.print(shown)
    judged = f"accuracy by {verifier}" if verifier else "no verifier, so no accuracy (evaluation.verifier)"
    text = f"{problems} held-out problems in each mode, {judged}"
    if any("forward_kl" in m.values for _, m in rows):
        text += "; divergences in nats a token at temperature 1, on the teacher's answers"
    console.print(f"{text}.", markup=False, highlight=False, soft_wrap=True)


def write(
    out: Path, rows: Sequence[tuple[str, Measurement]], folders: Sequence[Path], problems: int, config: Config
) -> None:
    """Every number as JSON, with the folders, what was trained there, and the settings."""
    from student_trainer.checkpoints import read_about
    from student_trainer.storage import write_json

    first = len(rows) - len(folders)
    models: list[Mapping[str, Any]] = []
    for i, (name, found) in enumerate(rows):
        folder = folders[i - first] if i >= first else None
        about = read_about(folder) if folder is not None else {}
        place = None if folder is None else str(folder)
        trained = {key: about.get(key) for key in ("stage", "step")}
        models.append({"model": name, "folder": place, **trained, "values": found.values, "samples": found.samples})
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"problems": problems, "config": config.model_dump(mode="json")}
    write_json(out, {"models": models, **settings})
