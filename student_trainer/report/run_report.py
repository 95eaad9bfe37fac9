"""What a run's report shows, gathered while the run goes on, and written as `report.html` in its output folder.

It is written after every measurement and when the run ends, however it ends, so an interrupted run shows how far it
got. Knows the metrics of the stages by their folders, and no HTML.
"""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from protos.scores import TeacherInfo

from ..config import Config
from ..errors import explain
from ..history import Line, read

log = logging.getLogger(__name__)

NAME = "report.html"
PACKAGES = ("strong2weak", "torch", "transformers", "accelerate", "grpcio", "numpy", "vllm")

Samples = Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Stage:
    """A stage in the report: its folder, and the values that its student had before the first step."""

    title: str
    folder: Path
    before: Mapping[str, Any]
    temperature: float

    def metrics(self) -> list[Line]:
        """Everything that was measured so far."""
        return read(self.folder)


@dataclass
class RunReport:
    """See the module. `teachers` is what each teaches (anything where one is all), `rows` and `notes` are those of the
    final table, `before` the first student's sample outputs.
    """

    config: Config
    stage: str
    teachers: Mapping[str, TeacherInfo]
    command: Sequence[str]
    main: bool = True
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    before: Samples = ()
    stages: list[Stage] = field(default_factory=list)
    state: str = "running"

    @property
    def path(self) -> Path:
        """Where the report is."""
        return Path(self.config.training.output_dir) / NAME

    def begin_stage(self, title: str, folder: Path, temperature: float) -> None:
        """A stage begins, with the student of the last row of the table."""
        before = dict(self.rows[-1]) if self.rows else {}
        if len(self.rows) > 2:
            before.pop("loss", None)  # that of the stage before, another one
        self.add_stage(title, folder, temperature, before)

    def add_stage(self, title: str, folder: Path, temperature: float, before: Mapping[str, Any] | None = None) -> None:
        """Shows what `folder` holds as a stage whose loss is at `temperature`."""
        self.stages.append(Stage(title, folder, before or {}, temperature))

    def write(self) -> None:
        """Writes the report as things stand; where that fails the run goes on, with a warning."""
        if not self.main:
            return
        from .page import page

        temporary = self.path.with_name(f".{NAME}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(page(self), encoding="utf-8")
            os.replace(temporary, self.path)
        except OSError as error:
            log.warning("the report %s could not be written: %s", self.path, error)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Writes the report when the block ends, with how it ended, if anything was measured by then."""
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt)
            self.state = (
                "interrupted" if stopped else f"stopped: {explain(error) or f'{type(error).__name__}: {error}'}"
            )
            if self.rows:
                self.write()
            raise
        self.state = "finished"
        self.write()
        if self.main:
            log.info("report in %s", self.path)


def versions() -> dict[str, str]:
    """Of Python, the system and the packages that matter, as far as they are installed."""
    found = {"python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
