"""`python -m student_trainer collect`: the off-policy dataset alone, made by the teacher, without a student.

Asks for what stage 1 would ask for, with its settings, and writes a dataset of responses that
non_policy_distillation.dataset_path takes. Of the student only the tokenizer is loaded. Knows no loss and no training.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from student_trainer.commands.common import add_settings, command_parser, configuration
from student_trainer.config import Config
from student_trainer.errors import UserError

if TYPE_CHECKING:
    from student_trainer.responses import Response

EPILOG = """\
What is asked follows from the settings of stage 1: data.data_path, non_policy_distillation.max_prompts,
max_new_tokens, response_temperature, response_top_p. An interrupted collection goes on with --resume; what had arrived
is not asked for again. The log is training.log_file."""


def make_parser() -> argparse.ArgumentParser:
    """The command line of `collect`."""
    parser = command_parser("collect", "Makes the dataset of the teacher's responses that stage 1 trains on.", EPILOG)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the dataset [default: responses.parquet in output_dir]"
    )
    parser.add_argument(
        "--samples", type=int, metavar="N", help="responses for each prompt and mode [default: samples_per_prompt]"
    )
    parser.add_argument(
        "--modes",
        choices=("both", "thinking", "non_thinking", "mixed"),
        help="modes in which each prompt is answered [default: non_policy_distillation.modes]",
    )
    parser.add_argument("--resume", action="store_true", help="go on with what the folder holds")
    add_settings(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit status."""
    options = make_parser().parse_intermixed_args(arguments)
    flags = {"samples_per_prompt": options.samples, "modes": options.modes}
    settings = [f"non_policy_distillation.{key}={value}" for key, value in flags.items() if value is not None]
    config = configuration(options.config, [*options.settings, *settings])
    out = options.out or Path(config.training.output_dir) / "responses.parquet"
    check_target(out, resume=options.resume)
    collect(config, out)
    return 0


def check_target(out: Path, *, resume: bool) -> None:
    """UserError where something is in the way that this collection does not go on with."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, a dataset is a folder of parts", "--out", "name a new folder")
    if out.is_dir() and any(out.iterdir()) and not resume:
        raise UserError(f"{out} is there already", "--out", "go on with it (--resume), or name a new folder")


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Keeps other processes from collecting into the same folder; UserError where one does."""
    import fcntl

    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another process collects into {out}", "--out", "wait for it, or name another") from None
        yield


def collect(config: Config, out: Path) -> None:
    """Asks for what `out` does not hold yet, and says what it holds then."""
    from student_trainer import off_policy, rejection, responses
    from student_trainer.data import load_examples
    from student_trainer.models import describe
    from student_trainer.modes import prompt_tokens
    from student_trainer.opening import open_teachers
    from student_trainer.reporting import Reporter, default_console, logging_to
    from student_trainer.stage import training_device

    # Only what generates is asked of the teacher; what the losses need is for the training to check.
    options = config.non_policy_distillation.model_copy(
        update={"alpha": 0.0, "beta": 1.0, "distribution": "top_k", "dataset_path": None}
    )
    config = config.model_copy(update={"non_policy_distillation": options})
    console = default_console()
    with ExitStack() as stack:
        stack.enter_context(logging_to(config.training.log_file, console, True))
        reporter = Reporter(console)
        rejection.verifier_of(config)  # a wrong name is told before anything is asked
        student = describe(config, config.models.student_model)
        train, held_out = load_examples(config.data, config.training.seed, partial(prompt_tokens, student.tokenizer))
        domains = {example.domain for example in train}
        teachers = open_teachers(config, "non_policy", student, domains, reporter, training_device, stack)
        stack.enter_context(alone_in(out))
        requests, sampling = off_policy.wanted(config, train, student.tokenizer)
        total = len(requests) * options.samples_per_prompt
        say(console, f"{len(train)} prompts ({len(held_out)} more are held out), {total} responses wanted, into {out}")
        clock = Clock()
        with reporter.progress("teacher answers", total) as update:
            found = responses.collect(
                teachers,
                requests,
                sampling,
                out,
                samples=options.samples_per_prompt,
                progress=lambda done, _, tokens: update(done, clock.text(tokens)),
            )
        found = rejection.remembered(config, found, out)
        for line in summary(found, clock, config.data.max_length):
            say(console, line)
        say(console, f"Train on it with: non_policy_distillation.dataset_path={out}")


def say(console: Any, line: str) -> None:
    """Prints a line as it is."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


class Clock:
    """Tokens that arrived, and since when."""

    def __init__(self) -> None:
        self.began, self.tokens, self.responses = time.monotonic(), 0, 0

    def text(self, tokens: int) -> str:
        """The progress in words, once `tokens` have arrived in all and one more response."""
        self.tokens, self.responses = tokens, self.responses + 1
        return f"{tokens:,} tokens, {self.rate:,.0f} tokens/s"

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / max(time.monotonic() - self.began, 1e-9)


def summary(found: Sequence[Response], clock: Clock, max_length: int) -> Iterator[str]:
    """What a dataset holds, by mode, and what this collection did."""
    for mode in sorted({r.mode for r in found}, key=lambda m: m.value):
        yield f"{mode.value:13} {describe_part([r for r in found if r.mode is mode])}"
    long = sum(r.tokens > max_length for r in found)
    empty = sum(not len(r.completion_ids) for r in found)
    if long or empty:
        yield f"training leaves out {long} longer than data.max_length = {max_length} tokens and {empty} empty ones"
    yield (
        f"asked for {clock.responses:,} of {len(found):,} responses now: {clock.tokens:,} tokens, "
        f"{clock.rate:,.0f} tokens/s"
        if clock.responses
        else f"all {len(found):,} responses were there, nothing was asked for"
    )


def describe_part(found: Sequence[Response]) -> str:
    """Numbers of some responses on one line."""
    tokens = sorted(len(r.completion_ids) for r in found)
    reasons = Counter(r.finish_reason.value for r in found)
    ends = ", ".join(f"{name} {count / len(found):.1%}" for name, count in sorted(reasons.items()))
    text = (
        f"{len(found):,} responses to {len({r.example_id for r in found}):,} prompts, {sum(tokens):,} tokens"
        f" (median {tokens[len(tokens) // 2]:,}, longest {tokens[-1]:,}); ended by {ends}"
    )
    judged = [r.verified for r in found if r.verified is not None]
    return f"{text}; verified {sum(judged):,} of {len(judged):,}" if judged else text
