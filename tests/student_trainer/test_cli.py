"""The command line as users type it: flags, settings, exit codes, and one line for every error."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from protos import errors as teacher_errors
from student_trainer import __main__ as cli
from student_trainer.config import Config
from student_trainer.errors import UserError, explain
from student_trainer.settings import to_yaml
from tests.servers import ROOT
from tests.student_trainer.live import environment

SCRIPT = str(ROOT / "main_distillation.py")


def run(*arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments]
    return subprocess.run(command, cwd=cwd, env=environment() | env, capture_output=True, text=True, check=False)


def test_help_names_every_flag_and_imports_no_heavy_library(tmp_path: Path) -> None:
    code = (
        f"import sys, runpy\nsys.path.insert(0, {str(ROOT)!r})\nsys.argv = ['main_distillation.py', '--help']\n"
        f"try: runpy.run_path({SCRIPT!r}, run_name='__main__')\nexcept SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic', 'grpc'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    for flag in ("--create_config", "--config F", "--stage {all,non_policy,policy,test}", "--pretrained_student DIR"):
        assert flag in done.stdout
    assert "--resume [DIR]" in done.stdout
    assert "--dry-run" in done.stdout
    for name, (module, purpose) in cli.COMMANDS.items():
        assert re.search(rf"python -m student_trainer {name} +{re.escape(purpose)}", done.stdout)
        assert import_module(module).make_parser().prog == f"python -m student_trainer {name}"


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_a_wrong_flag_of_a_command_is_a_usage_error(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--no-such-flag"])
    assert ended.value.code == 2
    assert f"usage: python -m student_trainer {name}" in capsys.readouterr().err


def test_a_dry_run_prints_the_resolved_configuration_and_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("policy_distillation: {learning_rate: 1e-6, top_k: 5}\n")
    arguments = ["--config", "c.yaml", "data.max_length=99", "--stage", "policy", "--dry-run", "data.val_ratio=0.2"]
    done = run(*arguments, cwd=tmp_path, STRONG2WEAK_POLICY_DISTILLATION__TOP_K="6")
    assert done.returncode == 0, done.stderr
    printed = Config.model_validate(yaml.safe_load(done.stdout))
    assert (printed.data.max_length, printed.data.val_ratio) == (99, 0.2)
    assert (printed.policy_distillation.top_k, printed.policy_distillation.learning_rate) == (6, 1e-6)
    assert not (tmp_path / "distillation.log").exists()
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from student_trainer.__main__ import main; main(['--dry-run'])"
    )
    code += "; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True)


def test_create_config_writes_the_documented_file_and_leaves_a_changed_one(tmp_path: Path) -> None:
    file = tmp_path / "config" / "distillation_config.yaml"
    done = run("--create_config", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (
        0,
        "wrote config/distillation_config.yaml with every setting and its default\n",
    )
    assert Config.model_validate(yaml.safe_load(file.read_text())) == Config()
    file.write_text("training: {use_wandb: true}\n")
    done = run("--create_config", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: config/distillation_config.yaml: the file exists and was changed")
    assert file.read_text() == "training: {use_wandb: true}\n"
    assert run("--create_config", "--config", "other.yaml", cwd=tmp_path).returncode == 0
    assert yaml.safe_load(run("--dry-run", cwd=tmp_path).stdout)["training"]["use_wandb"] is True


def test_several_mistakes_are_several_lines(tmp_path: Path) -> None:
    done = run("data.max_lenght=3", "policy=3", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "error: command line: unknown key data.max_lenght, did you mean data.max_length?",
        "error: command line: unknown key policy, did you mean policy_distillation?",
    ]
    assert "Traceback" in (tmp_path / "distillation.log").read_text()


@pytest.mark.parametrize("arguments", [["--stage", "both"], ["--stag", "all"], ["--unknown"]])
def test_a_wrong_flag_is_a_usage_error(tmp_path: Path, arguments: list[str]) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "usage: main_distillation.py" in done.stderr


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, list[Any]]]:
    """Runs the command line in this process up to where a run would begin; gives the status and what run would get."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)

    def call(*arguments: str, fails: BaseException | None = None) -> tuple[int, list[Any]]:
        got: list[Any] = []

        def begin(*values: Any) -> None:
            got.extend(values)
            if fails is not None:
                raise fails

        monkeypatch.setattr(cli, "_run", begin)
        return cli.main(arguments), got

    return call


@pytest.mark.parametrize(
    ("arguments", "resume", "stage"),
    [
        ([], False, "all"),
        (["--resume"], True, "all"),
        (["--stage", "policy", "--resume", "outputs/x"], "outputs/x", "policy"),
        (["--resume", "training.seed=42"], True, "all"),
        (["training.seed=42", "--resume", "--stage", "non_policy"], True, "non_policy"),
        (["training.resume=true"], True, "all"),
    ],
)
def test_flags_reach_the_run(ran: Any, arguments: list[str], resume: bool | str, stage: str) -> None:
    status, (config, got_stage, student) = ran(*arguments)
    assert (status, config.training.resume, got_stage, student) == (0, resume, stage, None)


def test_a_pretrained_student_reaches_the_run(ran: Any) -> None:
    assert ran("--stage", "policy", "--pretrained_student", "./outputs/a b")[1][2] == "./outputs/a b"


ERRORS: list[tuple[BaseException, str]] = [
    (UserError("no such file", "a.json", "check the path"), "a.json: no such file; check the path"),
    (
        teacher_errors.Unavailable("no teacher answers at a:1"),
        "teacher: no teacher answers at a:1 (Unavailable); start",
    ),
    (teacher_errors.TeacherMismatch("f1, not f2"), "teacher: f1, not f2 (TeacherMismatch); the teacher was changed"),
    (OSError(errno.ENOSPC, "No space left on device", "outputs/x"), "outputs/x: the disk is full; free space or set"),
    (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), "the disk is full"),
    (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
    (FileNotFoundError(errno.ENOENT, "No such file", "a/b"), "a/b: no such file or folder; check the path"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), "/x: permission denied"),
    (OSError(errno.EADDRINUSE, "Address already in use"), "the address is in use; stop the other process"),
    (MemoryError(), "memory is full: MemoryError; lower batch_size"),
    (
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't allocate memory: 5"),
        "memory is full",
    ),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "the GPU's memory is full"),
    (
        OSError("x/y is not a local folder and is not a valid model identifier"),
        "a model could not be loaded: x/y is not",
    ),
    (
        ModuleNotFoundError("No module named 'wandb'", name="wandb"),
        "wandb is not installed; run: pip install 'strong2weak[wandb]'",
    ),
]


@pytest.mark.parametrize(("error", "line"), ERRORS, ids=lambda v: type(v).__name__ if isinstance(v, Exception) else "")
def test_errors_that_users_cause_are_one_line_with_the_traceback_in_the_log(
    ran: Any, capsys: pytest.CaptureFixture[str], error: BaseException, line: str
) -> None:
    assert ran(fails=error)[0] == 1
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith("error: " + line)
    log = Path("distillation.log").read_text()
    assert "Traceback" in log
    assert type(error).__name__ in log


def test_every_error_of_the_teacher_has_a_next_step() -> None:
    for kind in teacher_errors.TABLE:
        line = explain(kind("text"))
        assert line is not None
        assert line.startswith(f"teacher: text ({kind.__name__}); ")


def test_torch_and_safetensors_errors_are_known() -> None:
    import safetensors
    import torch

    assert "the GPU's memory is full" in (explain(torch.OutOfMemoryError("CUDA out of memory")) or "")
    assert "the weights are broken" in (explain(safetensors.SafetensorError("header too large")) or "")


def test_an_error_is_found_behind_others() -> None:
    error = RuntimeError("saving failed")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert "the disk is full" in (explain(error) or "")
    assert explain(RuntimeError("saving failed")) is None


def test_an_interrupt_says_how_to_go_on(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(fails=KeyboardInterrupt())[0] == 130
    assert capsys.readouterr().err == "interrupted; what was saved is valid, go on with --resume\n"


def test_a_bug_keeps_its_traceback(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert ran(fails=ZeroDivisionError("division by zero"))[0] == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.splitlines()[-1].startswith(
        "error: a bug of this program: ZeroDivisionError: division by zero; the traceback"
    )


def test_a_log_that_cannot_be_written_hides_nothing(ran: Any, capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").write_text("")
    assert ran("training.log_file=file/x.log", fails=UserError("what", "where", "next"))[0] == 1
    assert capsys.readouterr().err == "error: where: what; next\n"


def test_ranks_are_named_in_errors(
    ran: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    ran(fails=UserError("what"))
    assert capsys.readouterr().err == "error in rank 1: what\n"


def test_a_run_that_cannot_begin_ends_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "c.yaml").write_text(to_yaml(Config()))
    done = run("--config", "c.yaml", "--stage", "test", "models.student_model=./nowhere", cwd=folder)
    assert done.returncode == 1, done.stderr
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:]
    assert "Traceback" not in done.stderr
    assert "nowhere" in lines[-1]
    assert "Traceback" in (folder / "distillation.log").read_text()


def test_a_termination_signal_interrupts_in_order() -> None:
    code = (
        "import os, signal, sys, time\nfrom student_trainer import __main__ as cli\n"
        "def begin(*_):\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)\n"
        "    finally: print('cleaned up')\n"
        "cli._run = begin\nsys.exit(cli.main(['training.log_file=' + os.devnull]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (143, "cleaned up\n"), done.stderr


def test_the_package_is_a_command_too(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "student_trainer", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    assert yaml.safe_load(done.stdout)["training"]["seed"] == 42
    assert os.listdir(tmp_path) == []
