"""Starts the servers that are measured, one at a time, and says where they listen. Knows command lines, no question."""

from __future__ import annotations

import importlib.util
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.scoring import processes
from benchmarks.scoring.plan import Plan
from benchmarks.scoring.work import Skipped

START_S = 360.0
ADDRESS = "127.0.0.1"
VLLM_NAME = "model"
"""What vLLM's own server calls the model."""


@dataclass(frozen=True)
class Server:
    """A running server: its process id, addresses, the seconds that its start took, its command line, what it says of
    itself."""

    pid: int
    addresses: dict[str, str]
    start_s: float
    command: list[str]
    info: dict[str, Any]


@contextmanager
def teacher(plan: Plan, model: Path, work: Path) -> Iterator[Server]:
    """`python -m teacher_server` on the model, with its cache off."""
    ready, log = work / "ready.json", work / "teacher_server.log"
    command = ["-m", "teacher_server", "--backend", plan.backend, "--model", str(model), "--dtype", plan.dtype]
    command += [
        "--max-sequence-tokens",
        str(plan.load.tokens),
        "--batch-tokens",
        str(plan.batch_tokens),
        "--no-cache-enabled",
    ]
    command += ["--grpc-port", "0", "--http-port", "0", "--ready-file", str(ready)]
    if plan.backend == "vllm":
        command += ["--vllm-engine-args", json.dumps(plan.engine_args)]
    ready.unlink(missing_ok=True)
    begun = time.monotonic()
    with processes.running(command, log) as process:
        processes.wait(process, log, ready.exists, START_S, "the teacher server")
        said = json.loads(ready.read_text("utf-8"))
        addresses = {"grpc": said["grpc"], "http": said["http"]}
        took = time.monotonic() - begun
        info = httpx.get(addresses["http"] + "/v1/teacher", trust_env=False).raise_for_status().json()
        yield Server(process.pid, addresses, took, ["python", *command], info)


@contextmanager
def vllm_http(plan: Plan, model: Path, work: Path) -> Iterator[Server]:
    """vLLM's own OpenAI-shaped server on the model, with the same engine arguments."""
    need_vllm()
    log, port = work / "vllm_http.log", _free_port()
    arguments = plan.vllm_arguments(model)
    command = ["-m", "vllm.entrypoints.openai.api_server", "--host", ADDRESS, "--port", str(port)]
    command += ["--served-model-name", VLLM_NAME, "--max-logprobs", "64", "--disable-uvicorn-access-log"]
    for name, value in arguments.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            command.append(option if value else "--no-" + option[2:])
        else:
            command += [option, value if isinstance(value, str) else json.dumps(value)]
    begun = time.monotonic()
    with processes.running(command, log) as process:
        processes.wait(process, log, lambda: _answers(port), START_S, "vLLM's own server")
        address = f"http://{ADDRESS}:{port}"
        yield Server(process.pid, {"http": address}, time.monotonic() - begun, ["python", *command], {})


def prefill(plan: Plan, model: Path, work: Path) -> dict[str, Any]:
    """The answer of `benchmarks.scoring.prefill`."""
    if plan.backend == "vllm":
        need_vllm()
    question, answer, log = work / "prefill.json", work / "prefill_answer.json", work / "prefill.log"
    asked = {
        "backend": plan.backend,
        "model": str(model),
        "dtype": plan.dtype,
        "batch_tokens": plan.batch_tokens,
        "engine_args": plan.vllm_arguments(model) | {"skip_tokenizer_init": True, "disable_log_stats": True},
        "load": asdict(plan.load),
        "seconds": 2 * plan.seconds,
        "repeats": plan.repeats,
    }
    question.write_text(json.dumps(asked), "utf-8")
    answer.unlink(missing_ok=True)
    command = ["-m", "benchmarks.scoring.prefill", str(question), str(answer)]
    with processes.running(command, log) as process:
        processes.wait(process, log, lambda: _is_json(answer), START_S, "the engine alone")
    found: dict[str, Any] = json.loads(answer.read_text("utf-8"))
    return found


def need_vllm() -> None:
    """Skipped where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("vLLM is not installed here")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind((ADDRESS, 0))
        return int(found.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        return httpx.get(f"http://{ADDRESS}:{port}/health", trust_env=False, timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return True
