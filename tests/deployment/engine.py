"""The Docker engine that is reachable here, if any, and its Compose; it starts none."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from tests.servers import ROOT

CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")


def run(*command: str, env: dict[str, str] | None = None, check: bool = True) -> str:
    """What a command writes to standard output; AssertionError with its last lines where it fails."""
    found = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **(env or {})}, capture_output=True, text=True, check=False
    )
    assert not check or found.returncode == 0, f"{' '.join(command)}\n{(found.stdout + found.stderr)[-4000:]}"
    return found.stdout


def compose_command() -> list[str] | None:
    """`docker compose`, or docker-compose of version 2 or later; None where there is neither."""
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]):
            found = subprocess.run([*command, "version", "--short"], capture_output=True, text=True, check=False)
            if found.returncode == 0 and not found.stdout.startswith("1."):
                return command
    return None


def missing() -> str:
    """Why containers cannot be run here; empty where they can."""
    if shutil.which("docker") is None:
        return "no docker here"
    if compose_command() is None:
        return "no docker compose here"
    found = subprocess.run(["docker", "info"], capture_output=True, text=True, check=False)
    return "" if found.returncode == 0 else "no Docker engine is reachable"
