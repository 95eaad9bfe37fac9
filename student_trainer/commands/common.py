"""What the commands share: --config and settings on their command lines, and the configuration that follows."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from student_trainer.config import Config


def command_parser(name: str, description: str, epilog: str = "") -> argparse.ArgumentParser:
    """A parser of `python -m student_trainer NAME` that takes --config and settings."""
    parser = argparse.ArgumentParser(
        prog=f"python -m student_trainer {name}",
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_config(parser)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    """Takes --config."""
    parser.add_argument(
        "--config",
        metavar="F",
        type=Path,
        help="YAML or JSON file with settings [default: config/distillation_config.yaml where it exists]",
    )


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Takes settings as the last positional arguments."""
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="settings that win over all others")


def configuration(file: Path | None, overrides: Sequence[str]) -> Config:
    """The configuration, as training would have it; UserError with a line for each mistake."""
    from student_trainer import settings

    return settings.load_config(file, list(overrides), os.environ)
