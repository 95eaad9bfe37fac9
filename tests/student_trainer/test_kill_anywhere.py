"""A run that is killed at any point of both stages ends with the weights of one that was not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT, environment


@pytest.mark.slow
def test_a_run_killed_at_any_point_ends_with_the_same_weights_bit_by_bit(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.student_trainer.kill_anywhere", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= 20
    assert (found["missed"], found["differing"]) == ([], [])
    assert not found["same_however_old"], "old rollouts must not be the fresh ones"
