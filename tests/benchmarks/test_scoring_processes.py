"""Processes end with all that they started, and say why they failed."""

import os
import time
from pathlib import Path

import pytest

from benchmarks.scoring import processes


def fail(text: str) -> None:
    raise ValueError(text)


def test_a_function_runs_in_a_process_of_its_own() -> None:
    assert processes.in_process(os.getpid, 60) != os.getpid()


def test_a_failure_in_another_process_comes_back_with_its_text() -> None:
    with pytest.raises(processes.Failed, match="ValueError: no luck"):
        processes.in_process(fail, 60, "no luck")


def test_a_process_that_ends_early_is_a_failure_with_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    arguments = ["-c", "print('the reason'); raise SystemExit(3)"]
    with processes.running(arguments, log) as process, pytest.raises(processes.Failed, match="code 3:\nthe reason"):
        processes.wait(process, log, lambda: False, 60, "it")


def test_a_groups_children_end_with_it_and_their_cpu_time_is_told_apart(tmp_path: Path) -> None:
    child = "n = 0\nwhile True: n += 1"
    arguments = ["-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]
    with processes.running(arguments, tmp_path / "log") as process:
        end = time.monotonic() + 60
        while processes.cpu_seconds(process.pid)[1] < 0.5:
            assert time.monotonic() < end
            time.sleep(0.05)
        own, below = processes.cpu_seconds(process.pid)
        assert own < below
    assert processes.cpu_seconds(process.pid) == (0.0, 0.0)
    assert not [p for p in processes._all().values() if p.group == process.pid and not p.ended]
