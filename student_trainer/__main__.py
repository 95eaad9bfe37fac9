"""The command line of the trainer: flags, configuration, one line for every error that a user can mend.

It imports torch only once there is something to run, so that --help and --dry-run answer at once. The run is run.py;
commands beside it are modules with a `main`, named in COMMANDS.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from student_trainer.commands.common import add_config, add_settings

STAGES = ("all", "non_policy", "policy", "test")
COMMANDS = {
    "collect": ("student_trainer.commands.collect", "make the off-policy dataset alone: the teacher's responses"),
    "evaluate": ("student_trainer.commands.evaluate", "score checkpoints in both modes, side by side"),
    "export": ("student_trainer.export", "merge adapters and write a folder with whole weights"),
    "memory": ("student_trainer.commands.memory", "estimate the memory of the student's and the teacher's GPUs"),
}
"""Module and purpose of each command; `python -m student_trainer NAME --help` says more."""
EPILOG = """\
Settings: section.key=value on the command line over STRONG2WEAK_SECTION__KEY in the environment over the file over
defaults, for example policy_distillation.learning_rate=1e-5 or STRONG2WEAK_DATA__MAX_LENGTH=1024.
Exit status: 0 done, 1 an error that you can mend (one line says how), 2 a wrong command line, 130 interrupted
(Ctrl-C), 143 stopped by SIGTERM. While a stage trains, either saves a checkpoint first; a second one stops at once.

Commands, each with a --help of its own:
""" + "\n".join(f"  python -m student_trainer {name:9} {purpose}" for name, (_, purpose) in COMMANDS.items())


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="main_distillation.py",
        description="Distils a teacher into a student: stage 1 off-policy, stage 2 on-policy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--create_config",
        action="store_true",
        help="write config/distillation_config.yaml (or --config F) with every setting and its default, and stop",
    )
    add_config(parser)
    parser.add_argument(
        "--stage",
        choices=STAGES,
        default="all",
        help="all: both stages; non_policy: stage 1; policy: stage 2; test: load and try both models [default: all]",
    )
    parser.add_argument(
        "--pretrained_student",
        metavar="DIR",
        help="folder of the student that the stage starts from, a model or a checkpoint of an earlier run",
    )
    parser.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=None,
        metavar="DIR",
        help="continue from the newest checkpoint of each stage, or from the checkpoint folder DIR",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the resolved settings as YAML, and stop")
    add_settings(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments
    if given and given[0] in COMMANDS:
        return _command(given[0], given[1:])
    options = make_parser().parse_intermixed_args(given)
    if isinstance(options.resume, str) and "=" in options.resume and not Path(options.resume).exists():
        options.settings.insert(0, options.resume)  # `--resume section.key=value`
        options.resume = True
    log_file = Path("distillation.log")
    try:
        from student_trainer import settings

        if options.create_config:
            print(settings.create_config(options.config or settings.DEFAULT_FILE))
            return 0
        flags: dict[tuple[str, ...], Any] = {}
        if options.resume is not None:
            flags[("training", "resume")] = options.resume
        config = settings.load_config(options.config, options.settings, os.environ, flags)
        if options.dry_run:
            print(settings.to_yaml(config), end="")
            return 0
        log_file = Path(config.training.log_file)
        signal.signal(signal.SIGTERM, _interrupt)
        _run(config, options.stage, options.pretrained_student)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the one place where errors become exit codes
        return _report(error, log_file)
    return 0


def _command(name: str, arguments: Sequence[str]) -> int:
    """Runs a command beside training; the same errors and exit statuses."""
    try:
        signal.signal(signal.SIGTERM, _interrupt)
        status: int = importlib.import_module(COMMANDS[name][0]).main(arguments)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - as in `main`
        return _report(error, Path("distillation.log"))
    return status


def _run(config: Any, stage: str, pretrained_student: str | None) -> None:
    # Trainer and embedded teacher share the cores of a CPU: threads that spin while they wait slow both by ten times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from student_trainer.reporting import default_console
    from student_trainer.run import run

    run(config, stage, pretrained_student, default_console())


def _interrupt(number: int, frame: object) -> None:
    """SIGTERM ends a run as Ctrl-C does: in order, the teacher it started included."""
    from student_trainer.errors import Interrupted

    raise Interrupted(number)


def _report(error: BaseException, log_file: Path) -> int:
    """Says what happened on standard error, keeps the traceback in the log, and gives the exit status."""
    from student_trainer.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, Interrupted, explain

    rank = os.environ.get("RANK", "0")
    prefix = "error" if rank == "0" else f"error in rank {rank}"
    trace = "".join(traceback.format_exception(error))
    kept = _keep(trace, log_file)
    line = explain(error)
    if isinstance(error, KeyboardInterrupt):
        print(line, file=sys.stderr)
        return 128 + error.number if isinstance(error, Interrupted) else EXIT_INTERRUPTED
    if line is None:
        what = f"{type(error).__name__}: {error}"
        print(f"{trace}{prefix}: a bug of this program: {what}; {kept}, please report it", file=sys.stderr)
    else:
        for part in line.splitlines():
            print(f"{prefix}: {part}", file=sys.stderr)
    return EXIT_USER_ERROR


def _keep(trace: str, log_file: Path) -> str:
    """Appends a traceback to the log; says where it is."""
    try:
        log_file.expanduser().parent.mkdir(parents=True, exist_ok=True)
        with log_file.expanduser().open("a", encoding="utf-8") as log:
            log.write(f"{datetime.now():%Y-%m-%d %H:%M:%S} ERROR {trace}")
    except OSError as failure:
        return f"the traceback could not be written to {log_file} ({failure.strerror})"
    return f"the traceback is in {log_file}"


if __name__ == "__main__":
    raise SystemExit(main())
