"""A signal while a stage trains: a checkpoint, a message, an exit status; a second one ends the process at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from student_trainer.checkpoints import fault, on_policy_layout
from student_trainer.errors import Interrupted
from student_trainer.stopping import Stopper
from tests.servers import ROOT, environment, wait_for
from tests.student_trainer.test_stages import assert_same_weights, settings

LIMIT_S = 30.0
"""A checkpoint and the end, this is what the documents promise."""


@contextmanager
def trainer(folder: Path, endpoint: str, program: str = "main_distillation.py", **policy: Any) -> Iterator[Any]:
    """A process that trains stage 2 below `folder`; it has ended when the block has."""
    policy = {"gradient_accumulation_steps": 1} | policy
    resume = {"save_steps": 1000, "resume": True}
    config = settings(folder, endpoint, training=resume, policy_distillation=policy).model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, program, "--config", str(folder / "config.json"), "--stage", "policy"]
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def reached(folder: Path, step: int) -> Callable[[], bool]:
    log = folder / "distillation.log"
    return lambda: log.exists() and f"step {step}/" in log.read_text()


@pytest.mark.slow
def test_a_signal_saves_and_the_run_that_goes_on_ends_with_the_same_weights(
    tmp_path: Path, pair_teacher: dict[str, Any]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    steps = {"num_epochs": 20, "max_steps": 20}
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        done = on_policy_layout(str(one / "outputs")).checkpoints()
        with trainer(one, pair_teacher["grpc"], **steps) as process:
            wait_for(reached(one, done[-1][0] + 2 if done else 2))
            process.send_signal(number)
            shown = process.communicate(timeout=LIMIT_S)[1]
        assert process.returncode == status, shown
        step, checkpoint = on_policy_layout(str(one / "outputs")).checkpoints()[-1]
        assert fault(checkpoint) is None
        assert f"{number.name}: saving a checkpoint and stopping; a second signal stops at once" in shown
        assert f"stopped at step {step}: {checkpoint} is saved, go on with --resume" in shown
    for folder in (one, two):
        with trainer(folder, pair_teacher["grpc"], **steps) as process:
            assert process.wait(240) == 0, process.stderr.read()
    inside = Path("outputs") / "policy_distillation" / "final_policy_model"
    assert_same_weights(one / inside, two / inside, 0.0)


HANGING = """
import sys, time
from student_trainer import on_policy, stopping
stopping.GRACE_S = float(sys.argv.pop(1))
take = on_policy.RolloutFeed.take
def hang(self, step):
    found = take(self, step)
    if step.number == 2:
        print("hanging", file=sys.stderr, flush=True)
        while True:  # a signal between a wait's last look for one and the wait itself would be lost
            time.sleep(0.05)
    return found
on_policy.RolloutFeed.take = hang
from student_trainer.__main__ import main
sys.exit(main())
"""


@contextmanager
def hanging(folder: Path, endpoint: str, grace_s: float) -> Iterator[Any]:
    """A trainer whose third step never ends."""
    (folder / "hanging.py").write_text(HANGING)
    config = settings(folder, endpoint, training={"save_steps": 1000}).model_dump(mode="json")
    (folder / "config.json").write_text(json.dumps(config))
    command = [sys.executable, str(folder / "hanging.py"), str(grace_s), "--config", str(folder / "config.json")]
    environ = environment(PYTHONPATH=str(ROOT))
    process = subprocess.Popen([*command, "--stage", "policy"], env=environ, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        for line in process.stderr:
            if line.startswith("hanging"):
                break
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_step_that_does_not_end_is_broken_off_and_the_one_before_is_saved(
    tmp_path: Path, pair_teacher: dict[str, Any]
) -> None:
    with hanging(tmp_path, pair_teacher["grpc"], 1.0) as process:
        process.send_signal(signal.SIGTERM)
        shown = process.communicate(timeout=LIMIT_S)[1]
    assert process.returncode == 143, shown
    ((step, checkpoint),) = on_policy_layout(str(tmp_path / "outputs")).checkpoints()
    assert (step, fault(checkpoint)) == (2, None)
    assert f"stopped at step 2: {checkpoint} is saved" in shown


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once(tmp_path: Path, pair_teacher: dict[str, Any]) -> None:
    with hanging(tmp_path, pair_teacher["grpc"], 600.0) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline().startswith("SIGTERM: saving a checkpoint")
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT_S) == -signal.SIGTERM
    assert on_policy_layout(str(tmp_path / "outputs")).checkpoints() == []


@pytest.fixture
def handlers() -> Iterator[None]:
    """Puts the handlers of signals back."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_is_broken_off_while_it_is_held(handlers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("student_trainer.stopping.GRACE_S", 0.01)
    stopper, held = Stopper(), list[bool]()

    def work() -> None:
        with stopper.catching(), stopper.held():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)
            held.append(True)

    with pytest.raises(Interrupted) as caught:
        work()
    assert held == [True]
    assert caught.value.number == signal.SIGTERM


def test_without_a_signal_everything_is_as_before(handlers: None) -> None:
    before = signal.getsignal(signal.SIGTERM)
    stopper = Stopper()
    with stopper.catching():
        assert signal.getsignal(signal.SIGTERM) != before
        stopper.check()
    assert signal.getsignal(signal.SIGTERM) == before
