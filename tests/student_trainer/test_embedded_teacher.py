"""The embedded teacher: starts anywhere, says why it died, and never outlives the run."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from student_trainer import embedded_teacher
from student_trainer.config import Config
from student_trainer.errors import UserError, explain
from student_trainer.teacher_client import connect
from tests.student_trainer.live import environment


def config(folder: Path, model: str = "theoretical", *arguments: str) -> Config:
    return Config.model_validate(
        {
            "models": {"teacher_model": model, "load_in_4bit": False, "torch_dtype": "float32"},
            "training": {"output_dir": str(folder / "my outputs")},
            "teacher": {"server_args": ["--backend", "theoretical", *arguments]},
        }
    )


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    with contextlib.suppress(FileNotFoundError):
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def wait_gone(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.1)
    return not alive(pid)


def test_it_answers_on_both_transports_and_is_gone_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # not the clone: the packages are found all the same
    said: list[str] = []
    with embedded_teacher.start(config(tmp_path), said.append) as teacher:
        teacher.check()
        for address in (teacher.grpc, teacher.http):
            with connect(address) as client:
                assert client.teacher().name == "theoretical"
        assert teacher.log_path == tmp_path / "my outputs" / "teacher.log"
    assert not alive(teacher.process.pid)
    assert "ready" in teacher.log_path.read_text()
    assert all("starting the teacher theoretical" in line for line in said)


def test_a_second_run_appends_to_the_log(tmp_path: Path) -> None:
    sizes = []
    for _ in range(2):
        with embedded_teacher.start(config(tmp_path)) as teacher:
            pass
        sizes.append(teacher.log_path.stat().st_size)
    assert sizes[1] > sizes[0]


def test_a_teacher_that_cannot_start_is_one_line_with_its_own_words(tmp_path: Path) -> None:
    wrong = config(tmp_path, "theoretical", "--grpc-prt", "1")
    with pytest.raises(UserError) as caught, embedded_teacher.start(wrong):
        pass
    line = str(caught.value)
    assert "the teacher that this run started ended with status" in line
    assert "--grpc-prt" in line
    assert "teacher.log" in line
    assert "\n" not in line


def test_a_teacher_that_dies_on_the_way_ends_the_wait_for_it(tmp_path: Path) -> None:
    with embedded_teacher.start(config(tmp_path)) as teacher:
        waits: list[str] = []
        with connect(teacher.grpc, patience_s=600, on_wait=teacher.watching(waits.append)) as client:
            teacher.process.kill()
            teacher.process.wait()
            with pytest.raises(UserError, match="was ended by SIGKILL"):
                client.teacher(refresh=True)
    assert waits == []


def test_an_error_in_the_run_stops_the_teacher(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), embedded_teacher.start(config(tmp_path)) as teacher:
        raise ZeroDivisionError
    assert not alive(teacher.process.pid)


def test_a_killed_run_takes_its_teacher_with_it(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom student_trainer import embedded_teacher\n"
        "from tests.student_trainer.test_embedded_teacher import config\n"
        "with embedded_teacher.start(config(Path(sys.argv[1]))) as t:\n"
        "    print(t.process.pid, flush=True)\n    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pid = int(trainer.stdout.readline())
        assert alive(pid)
        trainer.send_signal(signal.SIGKILL)
        trainer.wait()
        assert wait_gone(pid, 15)


def test_an_unanswered_termination_ends_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded_teacher, "STOP_S", 0.5)
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()
    embedded_teacher._stop(process)
    process.stdout.close()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("models", "quantization"),
    [({}, "4bit"), ({"load_in_8bit": True}, "8bit"), ({"load_in_4bit": False}, "none")],
)
def test_the_models_section_becomes_the_servers_options(models: dict[str, Any], quantization: str) -> None:
    sections = {"models": models | {"trust_remote_code": True}, "teacher": {"server_args": ["--batch-tokens", "9"]}}
    line = embedded_teacher.command(Config.model_validate(sections), Path("a b/ready"))
    options = dict(zip(line[6::2], line[7::2], strict=False))
    assert options["--quantization"] == quantization
    assert options["--dtype"] == "bfloat16"
    assert options["--model"] == "Qwen/Qwen3-235B-A22B"
    assert line[-3:] == ["--trust-remote-code", "--batch-tokens", "9"]


def test_the_teacher_is_no_rank_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    got = embedded_teacher._environment()
    assert not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"} & got.keys()
    assert got["PYTHONPATH"].split(os.pathsep)[0] == str(embedded_teacher.ROOT)


def test_a_teacher_that_died_is_explained() -> None:
    assert (
        explain(UserError("the teacher that this run started ended with status 1: x", "teacher.log", "mend"))
        is not None
    )
