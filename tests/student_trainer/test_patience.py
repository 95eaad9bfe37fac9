"""A teacher that goes away while a stage trains is waited for; another one that comes in its place ends the run."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
from rich.console import Console

from protos.errors import TeacherMismatch
from student_trainer.errors import explain
from student_trainer.run import run
from teacher_server.backends.theoretical_backend import Behaviour
from tests.servers import serving, wait_for
from tests.student_trainer.kill_anywhere import Teacher, config, make_student


def test_another_teacher_in_its_place_ends_the_run_and_both_are_named(tmp_path: Path) -> None:
    student, log = make_student(tmp_path), tmp_path / "distillation.log"
    first, other = Teacher(student), Teacher(student, Behaviour(kappa=2.0))
    there, done = threading.Event(), threading.Event()
    address: list[str] = []

    def logged(text: str) -> bool:
        return done.is_set() or (log.exists() and text in log.read_text())

    def serve() -> None:
        with serving(lambda: first) as server:
            address.append(server.grpc)
            there.set()
            wait_for(lambda: logged("step 2/"))
        wait_for(lambda: logged("; waiting, "))
        with serving(lambda: other, grpc_port=int(address[0].rpartition(":")[2])):
            done.wait()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        there.wait()
        settings = config(tmp_path, student, address[0], 1)
        long = settings.policy_distillation.model_copy(update={"max_steps": 10_000, "num_epochs": 10_000})
        patient = settings.teacher.model_copy(update={"patience": 60.0})
        settings = settings.model_copy(update={"policy_distillation": long, "teacher": patient})
        with pytest.raises(TeacherMismatch) as caught:
            run(settings, "policy", None, Console(file=io.StringIO()))
    finally:
        done.set()
        thread.join()
    for teacher in (first, other):
        assert teacher.info.fingerprint in str(caught.value)
    assert "start the one this run began with" in (explain(caught.value) or "")
    assert "s of 60 s" in log.read_text(), "how long it was waited for is shown"
