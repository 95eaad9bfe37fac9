"""The teacher that a run starts for itself: a server process on free loopback ports that lives as long as the run.

It knows the server's command line and nothing of its inside, and no client. Its output is teacher.log in output_dir.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from student_trainer.config import Config
from student_trainer.errors import UserError, one_line

LOG_NAME = "teacher.log"
POLL_S = 0.1
REPORT_S = 1.0
STOP_S = 15.0
ROOT = Path(__file__).resolve().parents[1]
"""Folder that holds the packages, in a clone and where they are installed."""


@dataclass(frozen=True)
class EmbeddedTeacher:
    """A running teacher server: its addresses ("127.0.0.1:50051", "http://127.0.0.1:8000") and its process."""

    grpc: str
    http: str
    process: subprocess.Popen[bytes]
    log_path: Path
    log_start: int

    def check(self) -> None:
        """Raises UserError with the last lines of its log where it has died."""
        _check_alive(self.process, self.log_path, self.log_start)

    def watching(self, on_wait: Callable[[str], None] | None = None) -> Callable[[str], None]:
        """An `on_wait` for `teacher_client.connect` that ends the wait at once where this teacher has died."""

        def waiting(message: str) -> None:
            self.check()
            if on_wait is not None:
                on_wait(message)

        return waiting


@contextlib.contextmanager
def start(config: Config, on_wait: Callable[[str], None] | None = None) -> Iterator[EmbeddedTeacher]:
    """Starts `models.teacher_model`, waits until it answers, and stops it at the end, however that comes.

    `on_wait` gets a line about once a second while it loads. UserError with the last lines of its log where it ends.
    """
    output_dir = Path(config.training.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    log_path = output_dir / LOG_NAME
    with tempfile.TemporaryDirectory(prefix="teacher-") as folder, log_path.open("ab") as log:
        log_start = log.tell()
        ready_file = Path(folder) / "ready.json"
        process = subprocess.Popen(
            command(config, ready_file),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,  # Ctrl-C in the terminal goes to the trainer, which stops the teacher in order
        )
        try:
            addresses = _wait_ready(process, ready_file, log_path, log_start, config, on_wait)
            yield EmbeddedTeacher(addresses["grpc"], addresses["http"], process, log_path, log_start)
        finally:
            _stop(process)


def command(config: Config, ready_file: Path) -> list[str]:
    """The command line of the server for `config`; teacher.server_args come last and win."""
    models = config.models
    quantization = "4bit" if models.load_in_4bit else "8bit" if models.load_in_8bit else "none"
    options = {
        "--model": models.teacher_model,
        "--host": "127.0.0.1",
        "--grpc-port": "0",
        "--http-port": "0",
        "--dtype": models.torch_dtype,
        "--quantization": quantization,
        "--attn-implementation": models.attn_implementation,
        "--grace-s": "5",
        "--ready-file": str(ready_file),
    }
    flags = [part for pair in options.items() for part in pair]
    if models.trust_remote_code:
        flags.append("--trust-remote-code")
    runner = [sys.executable, "-u", "-m", "student_trainer.watched", str(os.getpid()), "teacher_server"]
    return [*runner, *flags, *config.teacher.server_args]


def _environment() -> dict[str, str]:
    """This process's environment with the packages on the path, without what makes it one of several ranks."""
    ranks = {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "GROUP_RANK",
        "ROLE_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    }
    kept = {k: v for k, v in os.environ.items() if k not in ranks and not k.startswith("TORCHELASTIC_")}
    kept["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return kept


def _wait_ready(
    process: subprocess.Popen[bytes],
    ready_file: Path,
    log_path: Path,
    log_start: int,
    config: Config,
    on_wait: Callable[[str], None] | None,
) -> dict[str, str]:
    began = reported = time.monotonic()
    while not ready_file.exists():
        _check_alive(process, log_path, log_start)
        now = time.monotonic()
        if on_wait is not None and now - reported >= REPORT_S:
            reported = now
            last = one_line("".join(_tail(log_path, log_start)[-1:]), 100)
            on_wait(
                f"starting the teacher {config.models.teacher_model}, {now - began:.0f} s{': ' if last else ''}{last}"
            )
        time.sleep(POLL_S)
    addresses: dict[str, str] = json.loads(ready_file.read_text(encoding="utf-8"))
    return addresses


def _check_alive(process: subprocess.Popen[bytes], log_path: Path, log_start: int) -> None:
    code = process.poll()
    if code is None:
        return
    lines = [one_line(line, 300) for line in _tail(log_path, log_start)]
    telling = [line for line in lines if "rror" in line][-1:] or lines[-3:]
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
    said = " / ".join(telling) or "it wrote nothing"
    step = "mend that, or name a running teacher with teacher.endpoint"
    raise UserError(f"the teacher that this run started {how}: {said}", str(log_path), step)


def _tail(log_path: Path, log_start: int) -> list[str]:
    """The last lines that the teacher wrote, blank ones left out."""
    with log_path.open("rb") as log:
        end = log.seek(0, os.SEEK_END)
        log.seek(max(log_start, end - 16_384))
        return [line for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the server in order, then by force, with everything that it started."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
