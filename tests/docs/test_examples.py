"""Every example of the README and of docs/ is checked, and run unless its page says why not; see examples.py."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.docs.bodies import check_json, check_yaml
from tests.docs.commands import check
from tests.docs.examples import ROOT, Example, examples, pages, problems
from tests.docs.programs import Wrong
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


@dataclass
class Desk:
    """Where examples run: a folder for each page, and the servers that some of them start."""

    root: Path
    ports: dict[str, dict[str, int]] = field(default_factory=dict)
    """For each serving command the free ports that stand for those of the examples."""
    running: list[subprocess.Popen[str]] = field(default_factory=list)
    page_ports: dict[str, dict[str, int]] = field(default_factory=dict)

    def folder(self, page: str) -> Path:
        """The page's folder, with the repository's shared parts in it."""
        folder = self.root / page.replace("/", "_")
        if not folder.is_dir():
            folder.mkdir()
            for name in SHARED:
                (folder / name).symlink_to(ROOT / name)
        return folder

    def environment(self, **more: str) -> dict[str, str]:
        """The variables of an example: `python` is this one, the project is on its path."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return environment(PYTHONPATH=str(ROOT), PATH=path, TOKENIZERS_PARALLELISM="false", **more)

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
            ready, log = folder / "ready.json", folder / "server.log"
            settings = {name: str(ports[port]) for port, name in PORTS.items()}
            with log.open("w") as out:
                server = subprocess.Popen(
                    ["bash", "-ec", f"exec {script}"],
                    cwd=folder,
                    env=self.environment(**settings, TEACHER_READY_FILE=str(ready)),
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
        """What a block prints; fails where it does not end with 0 or a call in it was refused."""
        text = self.as_written(example)
        if example.language == "bash":
            command = ["bash", "-eo", "pipefail", "-c", text.replace("curl -s ", "curl -sS --fail-with-body ")]
        else:
            command = [sys.executable, "-c", text]
        done = subprocess.run(
            command,
            cwd=self.folder(example.page),
            env=self.environment(),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{example.name}\n{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def free_port() -> int:
    """A port on which nobody listens now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """One desk for all pages; at its end every server that examples started has ended well."""
    made = Desk(tmp_path_factory.mktemp("examples"))
    yield made
    for server in made.running:
        server.send_signal(signal.SIGTERM)
    assert [server.wait(WAIT_S) for server in made.running] == [0] * len(made.running)


EXAMPLES = [example for page in pages() for example in examples(page)]


@pytest.mark.parametrize("page", pages())
def test_every_block_of_a_page_is_an_example_that_can_be_checked(page: str) -> None:
    wrong = [f"{e.name} {problem}" for e in examples(page) for problem in problems(e)]
    assert not wrong


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.name)
def test_an_example_is_what_the_programs_understand(example: Example) -> None:
    script = example.why if example.how == "beside" else example.text
    if example.language == "bash" or example.how == "beside":
        try:
            check(script, frozenset(e.title for e in examples(example.page)))
        except Wrong as error:
            pytest.fail(f"{example.name}: {error}")
    elif example.language == "yaml":
        assert not check_yaml(example.text) or example.how == "not run", check_yaml(example.text)
    elif example.language == "json":
        assert not check_json(example.text) or example.how == "not run", check_json(example.text)
    if example.language == "python":
        compile(example.text, example.name, "exec")


def is_run(example: Example) -> bool:
    """Whether the tests of this file run a block, or write it as a file, or compare it with what was printed."""
    if example.language in ("bash", "python"):
        return example.how in ("", "slow", "serves", "beside")
    return bool(example.title)


def run_page(desk: Desk, page: str, with_slow: bool) -> None:
    """Runs a page's blocks in order; those after a slow one that are not slow themselves do not need it."""
    printed = ""
    for example in filter(is_run, examples(page)):
        if example.title == "prints":
            assert printed.strip() == example.text.strip(), example.name
        elif example.title:
            target = desk.folder(page) / example.title
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(desk.as_written(example), encoding="utf-8")
        elif example.how == "serves":
            desk.serve(example)
        elif example.how != "slow" or with_slow:
            if example.how == "beside":
                desk.serve(example)
            printed = desk.run(example)


RUN = [page for page in pages() if any(map(is_run, examples(page)))]
SLOW = [page for page in RUN if any(e.how == "slow" for e in examples(page))]


@pytest.mark.parametrize("page", RUN)
def test_the_examples_of_a_page_run_as_written(page: str, desk: Desk) -> None:
    run_page(desk, page, with_slow=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("page", SLOW)
def test_the_slow_examples_of_a_page_run_as_written(page: str, desk: Desk) -> None:
    run_page(desk, page, with_slow=True)
