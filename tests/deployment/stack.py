"""The images built by a real Docker engine, and a project of Compose made of them.

A folder named by PIP_FIND_LINKS is lent to the build over HTTP, so that a machine may bring wheels of its own.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.deployment.engine import CERTIFICATES, compose_command, run
from tests.deployment.proxies import free_port
from tests.servers import ROOT

IMAGES = {
    "tools": ("teacher.Dockerfile", "tools"),
    "teacher-cpu": ("teacher.Dockerfile", "cpu"),
    "trainer-cpu": ("trainer.Dockerfile", "trainer"),
}
PROMETHEUS = "strong2weak-test-prometheus"
SECRET = "hf_ThisIsNoRealToken0123456789"
WITHOUT_GPUS = {"services": {name: {"deploy": None} for name in ("teacher", "trainer")}}


@contextmanager
def wheels() -> Iterator[str]:
    """An address of the folder that PIP_FIND_LINKS names, for builds in this machine's network; empty without one.

    The port is always the same, because layers are kept by their arguments.
    """
    folder = os.environ.get("PIP_FIND_LINKS", "")
    if not Path(folder or "/nowhere").is_dir():
        yield ""
        return
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ.get("WHEELS_PORT", "8899"))), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def build() -> None:
    """The three images; layers that the engine has already are not built again."""
    with wheels() as links:
        given = {"PIP_CERT": str(CERTIFICATES)} if CERTIFICATES.exists() and links else {}
        if links:
            given |= {"PIP_FIND_LINKS": links, "TORCH_INDEX_URL": "https://pypi.org/simple"}
        arguments = [word for key, value in given.items() for word in ("--build-arg", f"{key}={value}")]
        for name, (file, target) in IMAGES.items():
            what = ["-f", f"docker/{file}", "--target", target, "-t", f"strong2weak-{name}", "."]
            run("docker", "build", "--network=host", *arguments, *what)


def build_prometheus(folder: Path, binary: str) -> None:
    """An image with this machine's Prometheus, made as its own is: user, folders and entry point."""
    place = folder / "prometheus"
    place.mkdir()
    shutil.copy(binary, place / "prometheus")
    (place / "Dockerfile").write_text(
        "FROM python:3.11-slim\nCOPY prometheus /bin/prometheus\n"
        "RUN mkdir /prometheus && chown 65534:65534 /prometheus\nWORKDIR /prometheus\nUSER 65534\n"
        'ENTRYPOINT ["/bin/prometheus"]\n'
    )
    run("docker", "build", "-t", PROMETHEUS, str(place))


class Stack:
    """A project of Compose with ports of its own, a token of the hub, and its two trainers' configuration."""

    def __init__(self, folder: Path) -> None:
        config = yaml.safe_load((ROOT / "config" / "demo.yaml").read_text())
        config["non_policy_distillation"] |= {"max_prompts": 96, "num_epochs": 1, "max_steps": 1}
        config["policy_distillation"] |= {"max_steps": 100, "batch_size": 8, "gradient_accumulation_steps": 1}
        config["evaluation"] |= {"problems": 8}
        config["training"] |= {"logging_steps": 1, "save_steps": 40}
        (folder / "config").mkdir(mode=0o755)
        (folder / "config" / "demo.yaml").write_text(yaml.safe_dump(config))
        (folder / "token").write_text(SECRET)
        # Compose puts `null` away unless it is said that it replaces.
        override = yaml.safe_dump(WITHOUT_GPUS).replace("null", "!reset null")
        (folder / "without-gpus.yml").write_text(override)
        self.grpc, self.http, self.prometheus = free_port(), free_port(), free_port()
        self.folder, self.name = folder, f"strong2weak-test-{os.getpid()}"
        self.env = {
            "COMPOSE_PROJECT_NAME": self.name,
            "GRPC_PORT": str(self.grpc),
            "HTTP_PORT": str(self.http),
            "PROMETHEUS_PORT": str(self.prometheus),
            "PROMETHEUS_IMAGE": PROMETHEUS,
            "CONFIG": str(folder / "config"),
            "HF_TOKEN_FILE": str(folder / "token"),
            "SHM_SIZE": "64m",
        }

    def compose(self, *words: str, profile: str = "cpu", check: bool = True, **env: str) -> str:
        """Runs docker compose on this project; what it writes to standard output."""
        command = compose_command()
        assert command is not None
        return run(*command, "--profile", profile, *words, env={**self.env, **env}, check=check)

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self.compose("ps", "-aq", service).strip()

    def inspect(self, container: str) -> dict[str, Any]:
        """What the engine knows of a container."""
        (found,) = json.loads(run("docker", "inspect", container))
        return dict(found)

    def read(self, service: str, path: str) -> str:
        """A file that only a service's volumes have."""
        return self.compose("run", "--rm", "-T", "--no-deps", "--entrypoint", "cat", service, path)

    def file(self, service: str, path: str) -> Path:
        """A copy of it."""
        target = self.folder / path.strip("/").replace("/", "-")
        target.write_text(self.read(service, path))
        return target

    def log(self, container: str) -> str:
        """What a container has written."""
        found = subprocess.run(["docker", "logs", container], capture_output=True, text=True, check=True)
        return found.stdout + found.stderr

    def everybody(self) -> list[str]:
        """The ids of all containers of the project, also of those that have ended."""
        return run("docker", "ps", "-aq", "--filter", f"label=com.docker.compose.project={self.name}").split()
