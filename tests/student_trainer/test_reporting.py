"""What a run says: lines, live line, log file, table."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import pytest
from rich.console import Console

from student_trainer import reporting
from student_trainer.config import Training
from student_trainer.errors import UserError
from student_trainer.reporting import Reporter, final_table, logging_to, markdown_table, report_to, step_line

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
