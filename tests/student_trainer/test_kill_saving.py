"""A trainer that is killed while it saves goes on, and ends with the weights of one that was not killed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT, environment


@pytest.mark.slow
def test_a_trainer_killed_at_random_moments_of_saving_goes_on_each_time(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.student_trainer.kill_saving", "--kills", "6", str(tmp_path / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["kills"], found["resumed"], found["equal_weights"], found["leftovers"]) == (6, 6, True, [])
    assert found["killed_while_saving"] > 0
