"""What the containers run, run without any: the same commands, variables and scripts, with folders in place of volumes.

So keys, certificates, the health check, a trainer's settings and Prometheus' configuration are tested where no Docker
engine is; test_containers.py tests the containers themselves.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.certificates import make_authority
from tests.deployment.prometheus import query
from tests.deployment.proxies import free_port
from tests.deployment.test_compose import DOCKER, SERVICES, board
from tests.servers import ROOT, environment, serving, theory, wait_for

PATHS = re.compile(
    r"(?<![\w.}])/(keys-of-clients|keys|key|tls|authority|ca|outputs|run/secrets|models|prometheus)(?=[/\s\"]|$)"
)


def here(text: str, folder: Path) -> str:
    """A text whose paths of volumes are below `folder`."""
    return PATHS.sub(lambda found: f"{folder}/{found[1]}", text)


def variables(service: str, folder: Path, **changes: str) -> dict[str, str]:
    """The variables of a service, with folders for its volumes."""
    given = {name: here(value, folder) for name, value in SERVICES[service]["environment"].items()}
    return environment() | given | changes


def entry_point(file: str, target: str) -> list[str]:
    """The entry point of an image's target, with this Python."""
    stages = re.split(r"^FROM .* AS ", (DOCKER / file).read_text(), flags=re.MULTILINE)
    (stage,) = [stage for stage in stages if stage.split("\n")[0] == target]
    python, *rest = json.loads(re.findall(r"^ENTRYPOINT (.*)$", stage, re.MULTILINE)[0])
    assert python.startswith("python")
    return [sys.executable, *rest]


def script(name: str, *arguments: str, folder: Path, **changes: str) -> str:
    """What a script of the image `tools` writes, with folders for its volumes."""
    copy = folder / name
    copy.write_text(here((DOCKER / name).read_text(), folder))
    for volume in ("keys", "tls", "authority", "ca", "keys-of-clients"):
        (folder / volume).mkdir(exist_ok=True)
    given = environment() | {"TEACHER_KEYS_FILE": f"{folder}/keys/teacher-keys.json"} | changes
    given["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    found = subprocess.run(["sh", str(copy), *arguments], cwd=ROOT, env=given, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return found.stdout + found.stderr


def healthy(**given: str) -> subprocess.CompletedProcess[str]:
    """The health check's own command and what it says."""
    command = [sys.executable, str(DOCKER / "ready.py")]
    return subprocess.run(command, env=os.environ | given, capture_output=True, text=True, check=False)


def test_keys_and_certificates_are_made_once_and_certificates_again_for_other_names(tmp_path: Path) -> None:
    clients = SERVICES["keys"]["command"]
    said = script("make-keys.sh", *clients, folder=tmp_path)
    keys = {name: (tmp_path / "keys-of-clients" / name / "key").read_text() for name in ("trainer", "prometheus")}
    password = (tmp_path / "keys-of-clients/grafana/password").read_text()
    assert script("make-keys.sh", *clients, folder=tmp_path) == "trainer has a key\nprometheus has a key\n"
    assert keys == {name: (tmp_path / "keys-of-clients" / name / "key").read_text() for name in keys}
    assert not [secret for secret in (*keys.values(), password) if secret.strip() in said]
    assert (tmp_path / "keys-of-clients/trainer/key").stat().st_mode & 0o007 == 0

    assert "made a certificate for DNS:teacher" in script("make-certificates.sh", folder=tmp_path)
    authority, first = (tmp_path / "ca/ca.pem").read_text(), (tmp_path / "tls/server.pem").read_text()
    assert "for more than a month" in script("make-certificates.sh", folder=tmp_path)
    assert (tmp_path / "tls/server.pem").read_text() == first
    script("make-certificates.sh", folder=tmp_path, TLS_NAMES="DNS:elsewhere,IP:192.0.2.7")
    verify = ["openssl", "verify", "-CAfile", f"{tmp_path}/ca/ca.pem", "-verify_hostname", "elsewhere"]
    subprocess.run([*verify, f"{tmp_path}/tls/server.pem"], check=True, capture_output=True)
    assert (tmp_path / "ca/ca.pem").read_text() == authority
    for secret in ("authority/ca.key", "tls/server.key"):
        assert (tmp_path / secret).stat().st_mode & 0o007 == 0


def test_the_health_check_speaks_mutual_tls(tmp_path: Path) -> None:
    ours, other = make_authority(tmp_path / "ours"), make_authority(tmp_path / "other")
    (cert, key), (client, client_key) = ours.pair("server"), other.pair("client")
    for authority, shown in (
        (ours, {}),
        (other, {"HEALTH_CERT_FILE": str(client), "HEALTH_KEY_FILE": str(client_key)}),
    ):
        tls = {"cert_file": str(cert), "key_file": str(key), "client_ca_file": str(authority.ca)}
        with serving(theory(), tls=tls) as server:
            given = {f"TEACHER_TLS_{name.upper()}": value for name, value in tls.items()}
            given["TEACHER_HTTP_PORT"] = server.http.rpartition(":")[2]
            assert healthy(**given, **shown).returncode == 0
            unlike = healthy(**given) if shown else healthy(**given | {"TEACHER_TLS_CERT_FILE": ""})
            assert unlike.returncode != 0
            assert unlike.stderr.startswith("not ready: ")
    assert healthy(TEACHER_HTTP_PORT=given["TEACHER_HTTP_PORT"]).stderr.startswith("not ready: ")


@contextmanager
def running(command: list[str], folder: Path, name: str, env: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A service as a process, whose output goes to `folder`."""
    with (folder / f"{name}.out").open("w") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=out)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


def prometheus(folder: Path, teacher: int, trainer: int, port: int) -> list[str]:
    """The service's command on its configuration, with addresses in place of names and scrapes each second."""
    config = yaml.safe_load(here((DOCKER / "prometheus" / "prometheus.yml").read_text(), folder))
    for job, own in zip(config["scrape_configs"], (teacher, trainer), strict=True):
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [f"127.0.0.1:{own}"]}]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(DOCKER / "prometheus" / "rules.yml")]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    command = [here(word, folder) for word in SERVICES["prometheus"]["command"]]
    command = [re.sub(r"--config.file=.*", f"--config.file={folder}/prometheus.yml", word) for word in command]
    binary = shutil.which("prometheus")
    assert binary is not None
    return [
        binary,
        *(re.sub(r"=/prometheus$", f"={folder}/tsdb", word) for word in command),
        f"--web.listen-address=:{port}",
    ]


EMPTY = {"Restarts of the engine in an hour", "Tokens that cost the engine nothing", "Failed attempts and calls"}
"""Panels whose first query finds nothing where nothing has gone wrong or was asked twice."""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus here (apt-get install prometheus)")
def test_teacher_trainer_and_prometheus_work_together_by_the_commands_of_their_services(tmp_path: Path) -> None:
    script("make-keys.sh", *SERVICES["keys"]["command"], folder=tmp_path)
    script("make-certificates.sh", folder=tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tiny_teacher").symlink_to(ROOT / "tiny_pair" / "teacher")
    (tmp_path / "run/secrets").mkdir(parents=True)
    (tmp_path / "run/secrets/hf_token").touch()
    grpc, http, metrics, port = (free_port() for _ in range(4))
    ports = {"TEACHER_GRPC_PORT": str(grpc), "TEACHER_HTTP_PORT": str(http), "TEACHER_HOST": "127.0.0.1"}
    given = variables("teacher-cpu", tmp_path, **ports)
    trainer = variables("trainer-cpu", tmp_path, STRONG2WEAK_TRAINING__METRICS_PORT=str(metrics))
    trainer["STRONG2WEAK_TEACHER__ENDPOINT"] = f"grpcs://127.0.0.1:{grpc}"
    short = {"data.max_examples": 24, "evaluation.problems": 4, "training.logging_steps": 1}
    short |= {"non_policy_distillation.max_steps": 2, "policy_distillation.max_steps": 20}
    command = [*entry_point("trainer.Dockerfile", "trainer"), *SERVICES["trainer-cpu"]["command"]]
    command += [f"{name}={value}" for name, value in short.items()]
    shutil.copytree(tmp_path / "keys-of-clients/trainer", tmp_path / "key")

    def ask(expression: str) -> list[Any]:
        return query(f"http://127.0.0.1:{port}/api/v1", expression)

    def seen() -> bool:
        assert run.poll() is None, (tmp_path / "trainer.out").read_text()[-3000:]
        return bool(ask('trainer_step{stage="policy"} >= 5') and ask("teacher_ready == 1"))

    with running(entry_point("teacher.Dockerfile", "cpu"), tmp_path, "teacher", given):
        wait_for(lambda: healthy(**given).returncode == 0)
        with running(command, tmp_path, "trainer", trainer) as run:
            scraper = tmp_path / "scraper"
            shutil.copytree(tmp_path / "keys-of-clients/prometheus", scraper / "key")
            shutil.copytree(tmp_path / "ca", scraper / "ca")
            with running(prometheus(scraper, http, metrics, port), tmp_path, "prometheus", dict(os.environ)):
                wait_for(seen, 240)
                empty = set()
                for panel in board()["panels"]:
                    for index, target in enumerate(panel.get("targets", [])):
                        text = target["expr"].replace("$__rate_interval", "30s").replace("$run", ".*")
                        if not ask(text) and index == 0:
                            empty.add(panel["title"])
                assert empty <= EMPTY
                groups = httpx.get(f"http://127.0.0.1:{port}/api/v1/rules").json()["data"]["groups"]
                assert not [rule for group in groups for rule in group["rules"] if rule["health"] == "err"]
            assert run.wait(240) == 0, (tmp_path / "trainer.out").read_text()[-3000:]
    assert (tmp_path / "outputs/run/policy_distillation/final_policy_model/config.json").exists()
    secrets = [(tmp_path / f"keys-of-clients/{name}/key").read_text().strip() for name in ("trainer", "prometheus")]
    for name in ("teacher", "trainer", "prometheus"):
        assert not [secret for secret in secrets if secret in (tmp_path / f"{name}.out").read_text()]
