"""Metrics to trackio: the real one, on this machine, without a network."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from student_trainer import trackio_report
from student_trainer.config import Training
from student_trainer.errors import UserError
from student_trainer.reporting import check_reports
from tests.servers import ROOT

SCRIPT = """
from types import SimpleNamespace
from student_trainer.trackio_report import TrackioReport

def train(first, last, goes_on):
    report = TrackioReport("mine", "outputs-policy", {"training": {"seed": 42}}, goes_on)
    for step in range(first, last + 1):
        logs = {"loss": 1 / step, "eval_sample_0": "text"}
        report.on_log(None, SimpleNamespace(global_step=step), None, logs)
    report.close()

train(1, 2, False)
train(3, 4, True)
train(1, 1, False)
"""


def test_trackio_that_is_not_installed_is_said_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    check_reports(Training())
    monkeypatch.setattr(trackio_report, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"training.use_trackio: trackio is not installed; .*strong2weak\[trackio\]"):
        check_reports(Training(use_trackio=True))


@pytest.mark.skipif(find_spec("trackio") is None, reason="trackio is not installed")
def test_a_stage_is_a_run_that_goes_on_where_the_stage_does(tmp_path: Path) -> None:
    places = {"TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SCRIPT],
        env={**os.environ, **places},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "what trackio says does not disturb the live line"
    database = sqlite3.connect(tmp_path / "mine.db")
    try:
        rows = database.execute("select run_id, run_name, step, metrics from metrics order by id").fetchall()
    finally:
        database.close()
    assert {name for _, name, _, _ in rows} == {"outputs-policy"}
    assert [(step, json.loads(metrics)) for _, _, step, metrics in rows] == [
        (step, {"loss": 1 / step}) for step in (1, 2, 3, 4, 1)
    ]
    runs = [run for run, *_ in rows]
    assert len(set(runs[:4])) == 1
    assert runs[4] not in runs[:4]
