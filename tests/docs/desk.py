"""Where examples run: a folder for each page, the servers that some of them start, and the ports of these."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from tests.docs.examples import ROOT, Example
from tests.servers import WAIT_S, environment, wait_for

PORTS = {"50051": "TEACHER_GRPC_PORT", "8000": "TEACHER_HTTP_PORT"}
"""Ports that examples name, and the setting by which a server of theirs listens on another."""
SHARED = (
    "tiny_pair",
    "dataset",
    "config",
    "benchmarks",
    "docs",
    "main_distillation.py",
    "docker-compose.yml",
    "LICENSE",
)
"""What an example finds of the repository in the folder in which it runs."""
SECONDS, SLOW_SECONDS = 150, 600
"""How long a block may take, and one that is marked slow, on a machine that is busy with other things."""


@dataclass
class Desk:
    """One for all pages of a test run."""

    root: Path
    ports: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each serving command the free ports that stand for those of the examples."""
    running: list[subprocess.Popen[str]] = field(default_factory=list)
    page_ports: dict[str, dict[str, int]] = field(default_factory=dict)
    """The ports of the server that a page started last."""

    def folder(self, page: str) -> Path:
        """The page's folder, with the repository's shared parts in it."""
        folder = self.root / page.replace("/", "_")
        if not folder.is_dir():
            folder.mkdir()
            for name in SHARED:
                (folder / name).symlink_to(ROOT / name)
        return folder

    def as_written(self, example: Example) -> str:
        """An example's text with the ports of the page's server in place of the usual ones."""
        text = example.text
        for port, actual in self.page_ports.get(example.page, {}).items():
            text = re.sub(rf":{port}\b", f":{actual}", text)
        return text

    def serve(self, example: Example) -> None:
        """Starts the server of an example and waits until it answers; the same command is started once."""
        script = example.why if example.how == "beside" else example.text.strip()
        command = " ".join(script.split())
        folder = self.folder(example.page)
        key = command if "tiny_pair/" in command else f"{example.page} {command}"
        if key not in self.ports:
            ports = {port: free_port() for port in PORTS}
            ready, log = folder / f"ready-{len(self.running)}.json", folder / "server.log"
            settings = {name: str(ports[port]) for port, name in PORTS.items()}
            with log.open("w") as out:
                server = subprocess.Popen(
                    ["bash", "-ec", f"exec {script}"],
                    cwd=folder,
                    env=surroundings(**settings, TEACHER_READY_FILE=str(ready)),
                    stdout=out,
                    stderr=out,
                    text=True,
                )
            self.running.append(server)
            wait_for(lambda: ready.exists() or server.poll() is not None)
            assert ready.exists(), f"{example.name}\n{log.read_text()}"
            self.ports[key] = ports
        self.page_ports[example.page] = self.ports[key]

    def run(self, example: Example) -> str:
        """What a block prints; fails where it does not end with 0, or a call in it was refused."""
        text = self.as_written(example)
        if example.language == "bash":
            command = ["bash", "-eo", "pipefail", "-c", text.replace("curl -s ", "curl -sS --fail-with-body ")]
        else:
            command = [sys.executable, "-c", text]
        folder, env, most = self.folder(example.page), surroundings(), SECONDS
        if example.how == "slow":
            most = SLOW_SECONDS
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=most)
        assert done.returncode == 0, f"{example.name}\n{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def close(self) -> list[int]:
        """Stops the servers; their exit codes."""
        for server in self.running:
            server.send_signal(signal.SIGTERM)
        return [server.wait(WAIT_S) for server in self.running]


def surroundings(**more: str) -> dict[str, str]:
    """The variables of an example: `python` is this one, the project is on its path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return environment(PYTHONPATH=str(ROOT), PATH=path, TOKENIZERS_PARALLELISM="false", **more)


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
