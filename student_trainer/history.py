"""The metrics of a stage as lines of JSON, `metrics.jsonl` in the stage's folder: they survive an interruption.

    {"step": 20, "steps": 20, "loss": 0.41, "forward_kl": ..., "seconds_teacher": ...} means over the last `steps` steps
    {"step": 20, "eval_loss": 0.40, "eval_accuracy_thinking": ...}                     a measurement
    {"step": 20, "samples": [["thinking", "problem", "answer"], ...]}                   its sample outputs
    {"step": 20, "saving": 1.5}                                                        seconds of the last models

Knows neither what the numbers mean nor how they are shown.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

log = logging.getLogger(__name__)

NAME = "metrics.jsonl"

Line = dict[str, Any]


def read(folder: Path) -> list[Line]:
    """The lines of a stage's folder, oldest first; one that a crash or a full disk cut off is left out."""
    path = folder / NAME
    if not path.is_file():
        return []
    lines = (_parsed(text) for text in path.read_text(encoding="utf-8", errors="replace").split("\n"))
    return [line for line in lines if line is not None]


class History(TrainerCallback):  # type: ignore[misc]
    """Appends to `folder`'s metrics. A stage that goes on from step N drops what was written after N."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._logged = folder, 0

    def begin(self, step: int) -> None:
        """Keeps the lines up to `step`."""
        kept = [line for line in read(self.folder) if line["step"] <= step] if step else []
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f".{NAME}.tmp"
        temporary.write_text("".join(map(_text, kept)), encoding="utf-8")
        os.replace(temporary, self.folder / NAME)
        self._logged = step

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends a line; where that fails training goes on, with a warning."""
        try:
            with (self.folder / NAME).open("a", encoding="utf-8") as file:
                file.write(_text({"step": step, **values}))
        except OSError as error:
            log.warning("the metrics of step %d are missing from %s: %s", step, self.folder / NAME, error.strerror)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins at the step that training begins at."""
        self.begin(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        """Appends numbers; sample outputs have lines of their own."""
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if "loss" in numbers:
            numbers = {"steps": state.global_step - self._logged, **numbers}
            self._logged = state.global_step
        if numbers:
            self.add(state.global_step, numbers)


def _parsed(text: str) -> Line | None:
    try:
        line: Line = json.loads(text)
    except ValueError:
        return None
    return line


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"
