"""Trains both stages through a proxy that breaks connections, and compares the weights with a run without it.

    python -m tests.faults.training FOLDER FAULT:TRANSPORT ...

Each run is the real program in a forked process: 20 steps of stage 1, 20 of stage 2, against a real server with the
theoretical teacher in its own process. Prints one line of JSON; exit status 1 where a run failed, a fault did not
strike, or a bit of the weights differs.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from student_trainer import run
from student_trainer.config import Config
from student_trainer.teacher_client import grpc_channel
from tests.faults.proxy import Fault, Proxy
from tests.servers import ROOT, environment, serving, wait_for
from tests.student_trainer.kill_anywhere import Teacher, differing
from tests.tiny_qwen3 import make

STEPS = 20
TIMEOUT_S = {"grpc": 60.0, "http": 2.0}
"""Of a call: a connection that is half-open is noticed by it over HTTP, and by an unanswered ping over gRPC."""


@contextmanager
def teacher(student: Path) -> Iterator[dict[str, str]]:
    """{"grpc": ..., "http": ...} of a theoretical teacher with the student's tokenizer, in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        ready = Path(folder) / "addresses"
        command = [sys.executable, "-m", __spec__.name, str(student), "--serve", str(ready)]
        process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=subprocess.PIPE)
        try:
            wait_for(lambda: (ready.exists() and ready.read_text()) or process.poll() is not None)
            yield json.loads(ready.read_text())
        finally:
            process.communicate()


def serve(student: Path, ready: Path) -> None:
    """Serves until standard input ends, without a cache, so that each repeated call is computed."""
    with serving(lambda: Teacher(student), cache={"enabled": False}) as server:
        ready.write_text(json.dumps({"grpc": server.grpc, "http": server.http}))
        sys.stdin.read()


def config(folder: Path, student: Path, address: str, timeout_s: float = 60.0) -> Config:
    """20 steps of each stage, one batch each."""
    stage = {"batch_size": 2, "gradient_accumulation_steps": 1, "num_epochs": 3, "learning_rate": 1e-2, "top_k": 8}
    stage |= {"max_steps": STEPS, "max_new_tokens": 6}
    return Config.model_validate(
        {
            "models": {"student_model": str(student), "torch_dtype": "float32", "load_in_4bit": False},
            "data": {"data_path": str(student.parent / "examples.json"), "max_length": 160, "val_ratio": 0.0},
            "training": {
                "output_dir": str(folder / "outputs"),
                "log_file": str(folder / "distillation.log"),
                "save_steps": 1000,
                "use_tensorboard": False,
            },
            "non_policy_distillation": stage,
            "policy_distillation": stage,
            "teacher": {"endpoint": address, "patience": 60, "timeout_s": timeout_s},
        }
    )


def child(settings: Config, seconds: int) -> int:
    """Runs both stages in a forked process; its exit code, negative where it did not end within `seconds`."""
    sys.stdout.flush()
    number = os.fork()
    if number == 0:
        import signal

        signal.alarm(seconds)
        try:
            run.run(settings, "all", None, Console(file=io.StringIO()))
        except BaseException:  # noqa: BLE001 - a forked child must not run on in its parent's code
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def trial(folder: Path, faults: list[str]) -> dict[str, Any]:
    """All runs: which failed, how often each fault struck, which weights differ."""
    student = make(folder / "student")
    examples = [{"instruction": f"Calculate {i}", "output": str(i)} for i in range(24)]
    (folder / "examples.json").write_text(json.dumps(examples))
    grpc_channel.KEEPALIVE_S, grpc_channel.KEEPALIVE_TIMEOUT_S = 1.0, 1.0
    gc.collect()
    gc.freeze()
    failed, struck, different = [], {}, []
    with teacher(student) as addresses:
        whole = config(folder / "whole", student, addresses["grpc"])
        if child(whole, 240):
            failed.append("whole")
        for name in faults:
            kind, _, transport = name.partition(":")
            with Proxy(addresses[transport], Fault(kind, strikes=2 if kind == "half-open" else 8)) as proxy:
                broken = config(folder / name.replace(":", "-"), student, proxy.address, TIMEOUT_S[transport])
                if child(broken, 240):
                    failed.append(name)
                else:
                    different += [f"{name} {tensor}" for tensor in differing(whole, broken)]
                struck[name] = proxy.struck
    return {"failed": failed, "struck": struck, "differing": different}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("faults", nargs="*")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.folder, options.serve)
        return 0
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    found = trial(options.folder, options.faults)
    print(json.dumps(found))
    return 1 if found["failed"] or found["differing"] or not all(found["struck"].values()) else 0


if __name__ == "__main__":
    raise SystemExit(main())
