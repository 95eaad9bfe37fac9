"""Trainings through a network that breaks end with the weights of one whose network was whole, bit by bit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import ROOT, environment


def train(folder: Path, *faults: str) -> None:
    """Runs `tests.faults.training`, which says what differs."""
    command = [sys.executable, "-m", "tests.faults.training", str(folder), *faults]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment(), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-5000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["failed"], found["differing"]) == ([], [])
    assert all(found["struck"][name] for name in faults), found


def test_connections_that_are_reset_in_the_middle_of_answers_cost_no_bit(tmp_path: Path) -> None:
    train(tmp_path / "runs", "reset:grpc")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_fault_of_the_network_costs_a_bit_of_either_stage(tmp_path: Path) -> None:
    train(tmp_path / "runs", "cut:http", "half-open:grpc", "half-open:http", "delay:grpc", "duplicate:http")
