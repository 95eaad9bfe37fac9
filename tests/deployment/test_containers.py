"""The images built and run by a real Docker engine: teacher-cpu, two trainers, certificates, and Prometheus before it.

It uses whatever engine `docker` reaches, and is skipped, saying why, where there is none. A folder named by
PIP_FIND_LINKS is lent to the build over HTTP, so that a machine may bring wheels of its own.
"""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from protos.scores import Prompt, Sampling
from student_trainer.teacher_client import Credentials, connect
from tests.deployment.engine import CERTIFICATES, compose_command, missing, run
from tests.deployment.proxies import free_port
from tests.servers import ROOT, wait_for

REASON = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(REASON), reason=f"containers are not run: {REASON}"),
]
RUN_S = 900.0
IMAGES = {"tools": "teacher.Dockerfile", "teacher-cpu": "teacher.Dockerfile", "trainer-cpu": "trainer.Dockerfile"}


@contextmanager
def wheels() -> Iterator[str]:
    """An address of the folder that PIP_FIND_LINKS names, for builds in this machine's network; empty without one."""
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
        for name, file in IMAGES.items():
            target = {"tools": "tools", "teacher-cpu": "cpu", "trainer-cpu": "trainer"}[name]
            arguments = [word for key, value in given.items() for word in ("--build-arg", f"{key}={value}")]
            tag = f"strong2weak-{name}"
            run(
                "docker",
                "build",
                "--network=host",
                *arguments,
                "-f",
                f"docker/{file}",
                "--target",
                target,
                "-t",
                tag,
                ".",
            )


class Stack:
    """A project of Compose with ports of its own, and its two trainers' configuration."""

    def __init__(self, folder: Path) -> None:
        config = yaml.safe_load((ROOT / "config" / "demo.yaml").read_text())
        config["non_policy_distillation"] |= {"max_prompts": 96, "num_epochs": 1, "max_steps": 1}
        config["policy_distillation"] |= {"max_steps": 120, "batch_size": 8, "gradient_accumulation_steps": 1}
        config["evaluation"] |= {"problems": 8}
        config["training"] |= {"logging_steps": 1, "save_steps": 40}
        (folder / "config").mkdir(mode=0o755)
        (folder / "config" / "demo.yaml").write_text(yaml.safe_dump(config))
        self.grpc, self.http = free_port(), free_port()
        self.folder = folder
        self.env = {
            "COMPOSE_PROJECT_NAME": f"strong2weak-test-{os.getpid()}",
            "GRPC_PORT": str(self.grpc),
            "HTTP_PORT": str(self.http),
            "CONFIG": str(folder / "config"),
            "SHM_SIZE": "64m",
        }

    def compose(self, *words: str, check: bool = True, **env: str) -> str:
        """Runs docker compose on this project."""
        command = compose_command()
        assert command is not None
        return run(*command, "--profile", "cpu", *words, env={**self.env, **env}, check=check)

    def container(self, service: str) -> str:
        """The id of a service's container."""
        return self.compose("ps", "-aq", service).strip()

    def inspect(self, container: str) -> dict[str, Any]:
        """What the engine knows of a container."""
        (found,) = json.loads(run("docker", "inspect", container))
        return dict(found)

    def file(self, service: str, path: str) -> Path:
        """A copy of a file that only a service's volumes have."""
        target = self.folder / path.strip("/").replace("/", "-")
        target.write_text(self.compose("run", "--rm", "-T", "--entrypoint", "cat", service, path))
        return target

    def log(self, container: str) -> str:
        """What a container has written."""
        found = subprocess.run(["docker", "logs", container], capture_output=True, text=True, check=True)
        return found.stdout + found.stderr


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A healthy teacher-cpu, with keys and certificates made as it was started."""
    build()
    found = Stack(tmp_path_factory.mktemp("stack"))
    try:
        found.compose("up", "--no-build", "--detach", "--wait", "teacher-cpu")
        yield found
    finally:
        found.compose("down", "--volumes", "--timeout", "5", check=False)


@pytest.fixture(scope="module")
def ca(stack: Stack) -> Path:
    return stack.file("tls", "/ca/ca.pem")


@pytest.fixture(scope="module")
def key(stack: Stack) -> Path:
    return stack.file("keys", "/keys-of-clients/trainer/key")


def test_the_teacher_has_a_user_without_rights_and_a_root_that_cannot_be_written(stack: Stack) -> None:
    teacher = stack.container("teacher-cpu")
    found = stack.inspect(teacher)
    host = found["HostConfig"]
    assert found["State"]["Health"]["Status"] == "healthy"
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"]) == (True, ["ALL"], False)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert {b["HostIp"] for ports in host["PortBindings"].values() for b in ports} == {"127.0.0.1"}
    mounts = {mount["Destination"]: mount["RW"] for mount in found["Mounts"]}
    assert mounts == {"/cache": True, "/keys": False, "/tls": False, "/run/secrets/hf_token": False}
    assert run("docker", "exec", teacher, "id", "-u").strip() == "10001"
    status = run("docker", "exec", teacher, "cat", "/proc/1/status", "/proc/self/status")
    assert [line.split()[1] for line in status.splitlines() if line.startswith("CapEff")] == ["0" * 16] * 2
    assert [line.split()[1] for line in status.splitlines() if line.startswith("NoNewPrivs")] == ["1"] * 2
    for place in ("/file", "/keys/file", "/opt/venv/file"):
        refused = subprocess.run(
            ["docker", "exec", teacher, "touch", place], capture_output=True, text=True, check=False
        )
        assert "Read-only file system" in refused.stderr


def test_both_ports_want_tls_and_a_key(stack: Stack, ca: Path, key: Path) -> None:
    context = ssl.create_default_context(cafile=str(ca))
    with httpx.Client(base_url=f"https://127.0.0.1:{stack.http}", verify=context) as client:
        assert client.get("/ready").status_code == 200
        assert client.get("/v1/teacher").status_code == 401
        named = client.get("/v1/teacher", headers={"Authorization": f"Bearer {key.read_text().strip()}"})
        assert named.status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://127.0.0.1:{stack.http}/ready")
    with connect(f"grpcs://127.0.0.1:{stack.grpc}", credentials=Credentials(str(key), str(ca))) as teacher:
        assert teacher.generate([Prompt(text="1+1=")], Sampling(4, seed=1))


def test_no_key_is_in_a_log_or_an_image(stack: Stack, key: Path) -> None:
    secret = key.read_text().strip()
    for service in ("keys", "tls", "teacher-cpu"):
        assert secret not in stack.log(stack.container(service))
    named = "find / -xdev ( -name *.key -o -name key -o -name .env ) -type f -size +0"
    for name in IMAGES:
        options = ["--rm", "--network=none", "--user=0", "--entrypoint", "find", f"strong2weak-{name}"]
        assert not run("docker", "run", *options, *named.split()[1:]).split()
        assert "Bearer" not in run("docker", "history", "--no-trunc", f"strong2weak-{name}")


def test_prometheus_scrapes_the_teacher_and_answers_the_board(stack: Stack, ca: Path) -> None:
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        pytest.skip("no prometheus here (apt-get install prometheus); its image is not run by the tests")
    config = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    (scrape,) = config["scrape_configs"]
    scrape["authorization"]["credentials_file"] = str(stack.file("keys", "/keys-of-clients/prometheus/key"))
    scrape["tls_config"]["ca_file"] = str(ca)
    del scrape["dns_sd_configs"]
    scrape["static_configs"] = [{"targets": [f"127.0.0.1:{stack.http}"]}]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(ROOT / "docker" / "prometheus" / "rules.yml")]
    file = stack.folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    port = free_port()
    options = [f"--config.file={file}", f"--storage.tsdb.path={stack.folder / 'tsdb'}"]
    server = subprocess.Popen(
        [prometheus, *options, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL
    )

    def ask(expression: str) -> list[Any]:
        answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", answer
        return list(answer["data"]["result"])

    def scraped() -> bool:
        assert server.poll() is None
        try:
            return bool(ask('up{job="teacher"} == 1 and teacher_ready == 1'))
        except httpx.TransportError:
            return False

    try:
        wait_for(scraped, 60)
        board = json.loads((ROOT / "docker" / "grafana" / "boards" / "teacher.json").read_text())
        for panel in board["panels"]:
            for target in panel["targets"]:
                ask(target["expr"].replace("$__rate_interval", "1m"))
        rules = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
        assert len(rules) == 1
        assert not [rule for rule in rules[0]["rules"] if rule["health"] == "err"]
    finally:
        server.terminate()
        server.wait(30)


def test_two_trainers_outlive_a_teacher_that_is_killed(stack: Stack) -> None:
    names = ["first", "second"]
    for name in names:
        stack.compose(
            "run", "--no-deps", "-d", "--name", f"{stack.env['COMPOSE_PROJECT_NAME']}-{name}", "trainer-cpu", RUN=name
        )
    trainers = [f"{stack.env['COMPOSE_PROJECT_NAME']}-{name}" for name in names]

    def training() -> bool:
        for trainer in trainers:
            assert stack.inspect(trainer)["State"]["Running"], stack.log(trainer)[-3000:]
        return all("stage 2, on-policy step 1/" in stack.log(trainer) for trainer in trainers)

    try:
        wait_for(training, RUN_S)
        teacher = stack.container("teacher-cpu")
        run("docker", "kill", teacher)
        time.sleep(3)
        assert all(stack.inspect(trainer)["State"]["Running"] for trainer in trainers)
        run("docker", "start", teacher)
        for trainer in trainers:
            code = subprocess.run(
                ["docker", "wait", trainer], capture_output=True, text=True, timeout=RUN_S, check=True
            )
            assert code.stdout.strip() == "0", stack.log(trainer)[-3000:]
            assert stack.inspect(trainer)["Config"]["User"] == "10001:10001"
        models = [f"/outputs/{name}/policy_distillation/final_policy_model/config.json" for name in names]
        stack.compose("run", "--rm", "--no-deps", "-T", "--entrypoint", "ls", "trainer-cpu", *models)
    finally:
        for trainer in trainers:
            subprocess.run(["docker", "rm", "--force", trainer], capture_output=True, check=False)


def test_a_teacher_that_is_stopped_ends_its_calls_first(stack: Stack, ca: Path, key: Path) -> None:
    stack.compose("up", "--no-build", "--detach", "--wait", "teacher-cpu")
    teacher = stack.container("teacher-cpu")
    credentials = Credentials(str(key), str(ca))
    with connect(f"grpcs://127.0.0.1:{stack.grpc}", credentials=credentials) as client, ThreadPoolExecutor(1) as pool:
        prompts = [Prompt(text=f"{number}+1=") for number in range(512)]
        call = pool.submit(client.generate, prompts, Sampling(100, seed=1, temperature=1.0))
        context = ssl.create_default_context(cafile=str(ca))
        headers = {
            "Authorization": f"Bearer {stack.file('keys', '/keys-of-clients/prometheus/key').read_text().strip()}"
        }

        def in_flight() -> bool:
            text = httpx.get(f"https://127.0.0.1:{stack.http}/metrics", verify=context, headers=headers).text
            return bool(re.search(r'^teacher_in_flight{method="generate"} [1-9]', text, re.MULTILINE))

        wait_for(in_flight)
        run("docker", "stop", "--time", "150", teacher)
        assert len(call.result(30)) == 512
    state = stack.inspect(teacher)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
