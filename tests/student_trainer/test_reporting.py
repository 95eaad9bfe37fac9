"""What a run says: lines, live line, log file, table."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import pty
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from student_trainer import reporting
from student_trainer.config import Training
from student_trainer.errors import UserError
from student_trainer.reporting import (
    Reporter,
    TrainingProgress,
    duration,
    final_table,
    live_text,
    logging_to,
    markdown_table,
    report_to,
    step_line,
)

ROWS = [
    {"model": "teacher", "accuracy_thinking": 0.998, "accuracy_non_thinking": 0.75, "forward_kl": 0.0, "seconds": 3.2},
    {"model": "student before", "accuracy_thinking": 0.01, "tail_share": 0.00123},
]


def test_the_log_file_gets_everything_and_the_console_what_matters(tmp_path: Path) -> None:
    shown, log = io.StringIO(), logging.getLogger("student_trainer.anything")
    with logging_to(str(tmp_path / "logs" / "d.log"), Console(file=shown, width=80), True):
        log.debug("small [print]")
        log.info("progress [1/2] " + "x" * 100)
    log.info("afterwards")
    text = (tmp_path / "logs" / "d.log").read_text()
    assert "small [print]" in text
    assert "progress [1/2]" in text
    assert "afterwards" not in text
    assert shown.getvalue() == "progress [1/2] " + "x" * 100 + "\n"


def test_other_processes_write_no_log_file(tmp_path: Path) -> None:
    shown = io.StringIO()
    with logging_to(str(tmp_path / "d.log"), Console(file=shown), False):
        logging.getLogger("student_trainer").info("from rank 1")
    assert not (tmp_path / "d.log").exists()
    assert shown.getvalue() == ""


def test_progress_without_a_terminal_is_a_line_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    reporter = Reporter(Console(file=io.StringIO()))
    with caplog.at_level(logging.INFO, "student_trainer"), reporter.progress("collecting", 9) as update:
        update(1, "")
        monkeypatch.setattr(reporting, "PLAIN_SECONDS", 0.0)
        update(2, "70 tokens")
    assert caplog.messages == ["collecting: 2 of 9 70 tokens"]


def test_progress_on_a_terminal_is_live_and_of_another_process_silent() -> None:
    for main, expected in ((True, "collecting"), (False, "")):
        shown = io.StringIO()
        with Reporter(Console(file=shown, force_terminal=True), main=main).progress("collecting", 3) as update:
            update(3, "")
        assert expected in shown.getvalue()
        assert bool(shown.getvalue()) is main


def test_a_step_line_names_what_is_there() -> None:
    line = step_line({"loss": 0.5, "reverse_kl": 0.25, "tail_share": 0.01, "seconds_teacher": 1.0})
    assert line == "loss 0.5000, reverse KL 0.2500, tail 1.00% (teacher 1.00 s)"


def test_the_live_line_has_loss_divergences_tail_speed_and_waiting() -> None:
    times = {"seconds_sampling": 1.0, "seconds_teacher": 0.5, "seconds_training": 2.0, "seconds_saving": 0.5}
    logs = {"loss": 0.5, "forward_kl": 0.25, "reverse_kl": 0.125, "tail_share": 0.01, "tokens_per_second": 940.2}
    text = "loss 0.500, KL forward 0.250, reverse 0.125, tail 1.00%, waiting 12%, 940 tokens/s"
    assert live_text(logs | times) == text
    assert live_text({"loss": 0.5}) == "loss 0.500"


def test_durations_are_words() -> None:
    assert [duration(s) for s in (12, 200, 3725)] == ["12 s", "3 min 20 s", "1 h 02 min"]


@pytest.mark.parametrize("width", [70, 200])
def test_on_a_terminal_a_stage_is_one_line_redrawn_and_the_log_file_has_plain_lines(tmp_path: Path, width: int) -> None:
    keeper, terminal = pty.openpty()
    shown: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while piece := os.read(keeper, 4096):
                shown.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    state = SimpleNamespace(global_step=0, max_steps=40)
    with os.fdopen(terminal, "w") as file:
        console = Console(file=file, width=width, _environ={"TERM": "xterm"})
        assert console.is_terminal
        with logging_to(str(tmp_path / "d.log"), console, True):
            progress = TrainingProgress(Reporter(console), "stage 1, off-policy")
            progress.on_train_begin(None, state, None)
            for step in range(1, 41):
                state.global_step = step
                logs = {"loss": 1 / step, "tail_share": 0.001, "seconds_teacher": 1.0, "seconds_training": 3.0}
                progress.on_log(None, state, None, logs)
                progress.on_step_end(None, state, None)
                time.sleep(0.02)
            progress.close()
    reader.join()
    os.close(keeper)
    text = b"".join(shown).decode()
    drawn, _ = text.rsplit("\x1b[1A", 1)
    assert "\x1b[1A" not in drawn, "the cursor only goes up to remove the line at the end"
    assert drawn.count("\n") == 1, "the line never scrolls"
    assert drawn.count("\r\x1b[2K") >= 3, "it is drawn again and again in its place"
    assert "step 3/40" not in text
    assert " left" in text
    if width == 200:
        assert "tail 0.10%, waiting 25%" in text
    lines = (tmp_path / "d.log").read_text().splitlines()
    assert len(lines) == 40
    assert lines[2].endswith(
        "INFO student_trainer: stage 1, off-policy step 3/40: loss 0.3333, tail 0.10% (teacher 1.00 s, training 3.00 s)"
    )
    assert "\x1b" not in "".join(lines)


def test_without_a_terminal_each_set_of_metrics_is_a_line(tmp_path: Path) -> None:
    shown, state = io.StringIO(), SimpleNamespace(global_step=1, max_steps=4)
    console = Console(file=shown, width=200)
    with logging_to(str(tmp_path / "d.log"), console, True):
        TrainingProgress(Reporter(console), "stage 2, on-policy").on_log(None, state, None, {"loss": 0.5})
    assert shown.getvalue() == "stage 2, on-policy step 1/4: loss 0.5000\n"


def test_the_table_is_shown_and_kept(tmp_path: Path) -> None:
    shown = io.StringIO()
    final_table(Console(file=shown, width=140), ROWS, tmp_path, ["over 512 problems"])
    assert "99.8%" in shown.getvalue()
    assert "over 512 problems" in shown.getvalue()
    assert json.loads((tmp_path / "summary.json").read_text()) == {"rows": ROWS, "notes": ["over 512 problems"]}
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert lines[0].startswith("| model | accuracy thinking | accuracy non-thinking | forward KL | reverse KL |")
    assert lines[3] == "| student before | 1.0% | – | – | – | 0.12% | – |"
    assert markdown_table(ROWS).splitlines() == lines[:4]


def test_wandb_is_told_its_project_or_said_to_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert report_to(Training()) == []
    monkeypatch.setenv("WANDB_PROJECT", "old")
    monkeypatch.setattr(reporting, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"strong2weak\[wandb\]"):
        report_to(Training(use_wandb=True))
    monkeypatch.setattr(reporting, "find_spec", lambda name: object())
    assert report_to(Training(use_wandb=True, wandb_project="mine")) == ["wandb"]
    assert reporting.os.environ["WANDB_PROJECT"] == "mine"
