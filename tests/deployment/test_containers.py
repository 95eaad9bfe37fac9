"""The images run by a real Docker engine: a teacher, two trainers, certificates, Prometheus, and what stands between.

It uses whatever engine `docker` reaches, and is skipped, saying why, where there is none.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from protos import errors
from protos.scores import Prompt, Sampling
from student_trainer.teacher_client import Credentials, connect
from tests.deployment.engine import missing, run
from tests.deployment.prometheus import query
from tests.deployment.proxies import free_port
from tests.deployment.stack import IMAGES, SECRET, Stack, build, build_prometheus
from tests.deployment.test_compose import board
from tests.servers import wait_for

REASON = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(bool(REASON), reason=f"containers are not run: {REASON}"),
]
RUN_S = 900.0
EMPTY_MASK = "0" * 16


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A healthy teacher-cpu, with keys and certificates made as it was started."""
    build()
    found = Stack(tmp_path_factory.mktemp("stack"))
    try:
        found.compose("up", "--no-build", "--detach", "--wait", "teacher-cpu")
        yield found
    finally:
        for container in found.everybody():
            subprocess.run(["docker", "rm", "--force", container], capture_output=True, check=False)
        found.compose("down", "--volumes", "--timeout", "5", check=False)


@pytest.fixture(scope="module")
def ca(stack: Stack) -> Path:
    return stack.file("tls", "/ca/ca.pem")


@pytest.fixture(scope="module")
def key(stack: Stack) -> Path:
    return stack.file("keys", "/keys-of-clients/trainer/key")


def check_confined(stack: Stack, container: str, user: str = "10001:10001") -> None:
    """No rights, no way to some, and a root file system that cannot be written."""
    found = stack.inspect(container)
    host = found["HostConfig"]
    assert found["Config"]["User"] == user
    assert (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"]) == (True, ["ALL"], False)
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert {b["HostIp"] for ports in (host["PortBindings"] or {}).values() for b in ports} <= {"127.0.0.1"}
    assert SECRET not in json.dumps(found)


def test_the_teacher_has_a_user_without_rights_and_a_root_that_cannot_be_written(stack: Stack) -> None:
    teacher = stack.container("teacher-cpu")
    check_confined(stack, teacher)
    found = stack.inspect(teacher)
    assert found["State"]["Health"]["Status"] == "healthy"
    assert (found["HostConfig"]["ShmSize"], found["Config"]["StopTimeout"]) == (64 << 20, 150)
    mounts = {mount["Destination"]: mount["RW"] for mount in found["Mounts"]}
    assert mounts == {"/cache": True, "/keys": False, "/tls": False, "/run/secrets/hf_token": False}
    (cache,) = [mount for mount in found["Mounts"] if mount["Destination"] == "/cache"]
    assert (cache["Type"], cache["Name"]) == ("volume", f"{stack.name}_cache")
    assert run("docker", "exec", teacher, "id", "-u").strip() == "10001"
    assert run("docker", "exec", teacher, "cat", "/run/secrets/hf_token") == SECRET
    status = run("docker", "exec", teacher, "cat", "/proc/1/status", "/proc/self/status")
    assert [line.split()[1] for line in status.splitlines() if line.startswith("CapEff")] == [EMPTY_MASK] * 2
    assert [line.split()[1] for line in status.splitlines() if line.startswith("NoNewPrivs")] == ["1"] * 2
    for place in ("/file", "/keys/file", "/opt/venv/file", "/opt/code/file"):
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


def test_the_engine_is_asked_for_gpus_and_for_the_time_that_a_load_takes(stack: Stack) -> None:
    stack.compose("create", "--no-build", "teacher", TEACHER_IMAGE="strong2weak-teacher-cpu")
    try:
        found = stack.inspect(stack.container("teacher"))
        (asked,) = found["HostConfig"]["DeviceRequests"]
        assert (asked["Driver"], asked["Count"], asked["Capabilities"]) == ("nvidia", -1, [["gpu"]])
        assert found["Config"]["Healthcheck"]["StartPeriod"] == 2 * 3600 * 10**9
    finally:
        stack.compose("rm", "--force", "teacher")


def test_no_secret_is_in_an_image(stack: Stack, key: Path) -> None:
    names = [word for name in ("*.key", "key", ".env", "teacher-keys.json") for word in ("-o", "-name", name)]
    for name in IMAGES:
        image = f"strong2weak-{name}"
        inside = ["docker", "run", "--rm", "--network=none", "--user=0", "--entrypoint"]
        assert not run(*inside, "find", image, "/", "-xdev", "(", *names[1:], ")", "-type", "f", "-size", "+0").split()
        places = ["/app", "/opt/code", "/home", "/root", "/etc", "/usr/local", "/src", "/models"]
        found = subprocess.run(
            [*inside, "grep", image, "-rlE", "BEGIN( EC| RSA)? PRIVATE KEY", *places], capture_output=True, text=True
        )
        assert found.stdout == ""
        told = run("docker", "history", "--no-trunc", image) + json.dumps(stack.inspect(image)["Config"])
        assert not re.search(r"Bearer|hf_[A-Za-z0-9]{20}|PASSWORD|PRIVATE KEY|://[^/\s]*:[^/\s]*@", told)


def test_certificates_are_renewed_while_a_teacher_runs_and_it_takes_them_in(stack: Stack, ca: Path) -> None:
    context = ssl.create_default_context(cafile=str(ca))
    context.check_hostname = False

    def names() -> set[str]:
        plain = socket.create_connection(("127.0.0.1", stack.http), timeout=10)
        with context.wrap_socket(plain, server_hostname="localhost") as tls:
            return {value for _, value in (tls.getpeercert() or {})["subjectAltName"]}

    assert "elsewhere" not in names()
    stack.compose("up", "--no-build", "--detach", "certificates", profile="tls", TLS_NAMES="DNS:elsewhere")
    wait_for(lambda: "elsewhere" in names())
    keeper = stack.container("certificates")
    check_confined(stack, keeper)
    assert stack.inspect(keeper)["State"]["Running"]
    stack.compose("stop", "certificates", profile="tls")
    assert stack.inspect(keeper)["State"]["ExitCode"] == 0, "it ends as it is told to, not ten seconds later by force"
    options = ["--detach", "--no-deps", "-e", "RENEW_S=1", "--name", f"{stack.name}-keeper"]
    stack.compose("run", *options, "certificates", profile="tls", TLS_NAMES="DNS:elsewhere")
    wait_for(lambda: stack.log(f"{stack.name}-keeper").count("for more than a month") >= 3)
    run("docker", "rm", "--force", f"{stack.name}-keeper")


class Prometheus:
    """What a Prometheus answers."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def ask(self, expression: str) -> list[Any]:
        """The series of an expression; none while it does not answer."""
        return query(self._url, expression)

    def alerts(self) -> list[Any]:
        """All alerts, as rules that are looked at."""
        groups = httpx.get(f"{self._url}/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def prometheus(stack: Stack) -> Prometheus:
    """The service `prometheus` with this machine's program in its image."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("no prometheus here (apt-get install prometheus); its own image is not run by the tests")
    build_prometheus(stack.folder, binary)
    stack.compose("up", "--no-build", "--detach", "prometheus", profile="obs")
    return Prometheus(stack.prometheus)


def test_two_trainers_outlive_a_teacher_that_is_killed_and_prometheus_sees_all(
    stack: Stack, prometheus: Prometheus
) -> None:
    trainers = {name: f"{stack.name}-{name}" for name in ("first", "second")}
    options = ["--no-deps", "--use-aliases", "--detach", "--name"]
    for name, container in trainers.items():
        stack.compose("run", *options, container, "trainer-cpu", RUN=name)

    def training() -> bool:
        for container in trainers.values():
            assert stack.inspect(container)["State"]["Running"], stack.log(container)[-3000:]
        return all("stage 2, on-policy step 1/" in stack.log(container) for container in trainers.values())

    def seen() -> bool:
        training()
        runs = {series["metric"]["run"] for series in prometheus.ask('trainer_step{stage="policy"} >= 1')}
        return runs == set(trainers) and bool(prometheus.ask('up{job="teacher"} == 1 and teacher_ready == 1'))

    wait_for(training, RUN_S)
    for container in trainers.values():
        check_confined(stack, container)
    wait_for(seen, 120)
    check_confined(stack, stack.container("prometheus"), user="65534")
    for panel in board()["panels"]:
        for target in panel.get("targets", []):
            prometheus.ask(target["expr"].replace("$__rate_interval", "1m").replace("$run", ".*"))
    assert len(prometheus.alerts()) > 10
    assert not [rule for rule in prometheus.alerts() if rule["health"] == "err"]

    teacher = stack.container("teacher-cpu")
    run("docker", "kill", teacher)
    time.sleep(3)
    assert all(stack.inspect(container)["State"]["Running"] for container in trainers.values())
    run("docker", "start", teacher)
    for container in trainers.values():
        code = subprocess.run(["docker", "wait", container], capture_output=True, text=True, timeout=RUN_S, check=True)
        assert code.stdout.strip() == "0", stack.log(container)[-3000:]
    models = [f"/outputs/{name}/policy_distillation/final_policy_model/config.json" for name in trainers]
    stack.compose("run", "--rm", "--no-deps", "-T", "--entrypoint", "ls", "trainer-cpu", *models)


def test_a_trainer_begins_when_its_teacher_is_healthy(stack: Stack) -> None:
    cpu = {f"{who}_IMAGE": f"strong2weak-{who.lower()}-cpu" for who in ("TEACHER", "TRAINER")}
    cpu |= {"TEACHER_BACKEND": "transformers", "TEACHER_MODEL": "/models/tiny_teacher"}
    cpu |= {"GRPC_PORT": str(free_port()), "HTTP_PORT": str(free_port())}
    cpu |= {"TRAINER_CONFIG": "config/demo.yaml", "RUN": "third"}
    files = ["--file", "docker-compose.yml", "--file", str(stack.folder / "without-gpus.yml")]

    def compose(*words: str) -> str:
        return stack.compose(*files, *words, profile="trainer", **cpu)

    try:
        compose("up", "--no-build", "--detach", "teacher", "trainer")
        teacher, trainer = (compose("ps", "-aq", name).strip() for name in ("teacher", "trainer"))
        health = stack.inspect(teacher)["State"]["Health"]
        healthy = next(test["End"] for test in health["Log"] if test["ExitCode"] == 0)
        assert stack.inspect(trainer)["State"]["StartedAt"] > healthy
        wait_for(lambda: "fingerprint" in stack.log(trainer), RUN_S)
        compose("stop", "--timeout", "60", "trainer")
    finally:
        compose("rm", "--force", "--stop", "teacher", "trainer")


def test_a_teacher_that_is_stopped_ends_its_calls_first(stack: Stack, ca: Path, key: Path) -> None:
    stack.compose("up", "--no-build", "--detach", "--wait", "teacher-cpu")
    teacher = stack.container("teacher-cpu")
    prompts = [Prompt(text=f"{number}+1=") for number in range(32)]
    begun = threading.Event()

    def call_until_it_is_gone() -> int:
        """Calls one after the other; how many had all their answers."""
        for number in itertools.count():
            try:
                assert len(client.generate(prompts, Sampling(60, seed=number, temperature=1.0))) == len(prompts)
            except errors.Unavailable:
                return number
            begun.set()
        raise AssertionError

    credentials = Credentials(str(key), str(ca))
    with (
        connect(f"grpcs://127.0.0.1:{stack.grpc}", credentials=credentials, patience_s=1) as client,
        ThreadPoolExecutor(4) as pool,
    ):
        calls = [pool.submit(call_until_it_is_gone) for _ in range(4)]
        assert begun.wait(RUN_S)
        stack.compose("stop", "teacher-cpu")
        assert sum(call.result(RUN_S) for call in calls) >= 1
    state = stack.inspect(teacher)["State"]
    assert (state["ExitCode"], state["OOMKilled"]) == (0, False)
    log = stack.log(teacher)
    assert re.search(r"draining [1-9]\d* calls.*generate of trainer: OK", log, re.DOTALL), log[-2000:]
    assert "giving up" not in log


def test_no_secret_is_in_a_log(stack: Stack, key: Path) -> None:
    secrets = [SECRET, key.read_text().strip(), stack.read("keys", "/keys-of-clients/prometheus/key").strip()]
    secrets.append(stack.read("keys", "/keys-of-clients/grafana/password").strip())
    assert all(len(secret) > 20 for secret in secrets)
    containers = stack.everybody()
    assert len(containers) >= 6
    for container in containers:
        log = stack.log(container)
        assert not [secret for secret in secrets if secret in log]
        assert "PRIVATE KEY" not in log
