"""Where settings come from, what is refused and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from teacher_server.config import ServerConfig, is_loopback
from teacher_server.settings import ConfigError, load, render


def test_the_command_line_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("model: from-file\ngrpc_port: 1\nhttp_port: 2\nname: file\n")
    environ = {"TEACHER_GRPC_PORT": "3", "TEACHER_NAME": "environment", "TEACHER_CONFIG": str(file)}
    config, dry_run = load(["--name", "line"], environ)
    assert (config.model, config.grpc_port, config.http_port, config.name) == ("from-file", 3, 2, "line")
    assert config.grace_s == 60
    assert not dry_run
    assert load(["--config", str(file)], {})[0].name == "file"


@pytest.mark.parametrize(
    ("arguments", "environ", "words"),
    [
        (["--model", "m", "--grpc-prt", "1"], {}, "unknown argument --grpc-prt; did you mean --grpc-port?"),
        (["--model", "m"], {"TEACHER_HTTP_PROT": "1"}, "TEACHER_HTTP_PROT; did you mean TEACHER_HTTP_PORT?"),
        ([], {}, "model is missing: give --model, TEACHER_MODEL or the key model"),
        (["--model", "m", "--grpc-port", "high"], {}, "grpc_port (command line): "),
        (["--model", "m"], {"TEACHER_GRPC_PORT": "70000"}, "grpc_port (environment): "),
        (["--model", "m", "--dtype", "float8"], {}, "'float32'"),
        (["--model", "m", "--config", "/does/not/exist"], {}, "cannot read the configuration file /does/not/exist"),
        (["--model", "m", "--vllm-engine-args", "3"], {}, "vllm.engine_args (command line): "),
        (["--model", "m"], {"TEACHER_VLLM_ENGIN_ARGS": "{}"}, "did you mean TEACHER_VLLM_ENGINE_ARGS?"),
        (["--model", "m", "--restart-attempts", "-1"], {}, "restart.attempts (command line): "),
        (["--model", "m"], {"TEACHER_RESTART_BACKOFF_S": "31"}, "restart.backoff_s (environment): "),
        (["--model"], {}, "--model: expected one argument"),
    ],
)
def test_what_cannot_be_used_is_refused_in_words(arguments: list[str], environ: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(arguments, environ)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("modle: x", "unknown key modle in"),
        ("modle: x", "did you mean model?"),
        ("- a", "it holds a list"),
        ("a: [", "is not YAML"),
        ("vllm: {engin_args: {}}", "unknown key vllm.engin_args in"),
        ("vllm: 3", "the section vllm of a file must hold keys and values, got 3"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "server.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(["--config", str(file)], {})
    assert words in str(caught.value)


def test_a_section_is_nested_in_a_file_and_flat_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("model: m\nvllm: {engine_args: {max_num_seqs: 3}}\n")
    line = ["--config", str(file)]
    assert load(line, {})[0].vllm.engine_args == {"max_num_seqs": 3}
    environ = {"TEACHER_VLLM_ENGINE_ARGS": '{"enforce_eager": true}'}
    assert load(line, environ)[0].vllm.engine_args == {"enforce_eager": True}
    config, _ = load([*line, "--vllm-engine-args", "{seed: 1, hf_overrides: {a: b}}"], environ)
    assert config.backend_options().vllm_engine_args == {"seed": 1, "hf_overrides": {"a": "b"}}
    file.write_text(render(config))
    assert load(line, {})[0] == config


def test_the_sources_of_a_sections_fields_mix(tmp_path: Path) -> None:
    file = tmp_path / "server.yaml"
    file.write_text("model: m\nrestart: {attempts: 1, window_s: 60}\n")
    line = ["--config", str(file), "--restart-attempts", "5"]
    policy = load(line, {"TEACHER_RESTART_BACKOFF_S": "2.5"})[0].restart_policy()
    assert (policy.attempts, policy.window_s, policy.backoff_s) == (5, 60, 2.5)


def test_what_kubernetes_says_about_a_service_named_teacher_is_not_a_setting() -> None:
    environ = {
        "TEACHER_SERVICE_HOST": "10.0.0.1",
        "TEACHER_SERVICE_PORT_GRPC": "50051",
        "TEACHER_PORT": "tcp://10.0.0.1:50051",
        "TEACHER_PORT_50051_TCP_ADDR": "10.0.0.1",
    }
    assert load(["--model", "m"], environ)[0].model == "m"


def test_what_dry_run_prints_is_a_file_that_gives_the_same_settings(tmp_path: Path) -> None:
    config, dry_run = load(["--model", "m", "--no-cache-enabled", "--grace-s", "1.5", "--dry-run"], {})
    assert dry_run
    file = tmp_path / "server.yaml"
    file.write_text(render(config))
    assert load(["--config", str(file)], {})[0] == config
    assert not config.cache.enabled


def test_the_settings_are_frozen_and_every_one_is_explained() -> None:
    config = ServerConfig(model="m")
    with pytest.raises(ValueError, match="frozen"):
        config.model = "other"  # type: ignore[misc]
    assert all(field.description for field in ServerConfig.model_fields.values())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "teacher.example.org", ""])
def test_an_address_that_others_reach_is_refused_unless_the_operator_says_so(host: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(["--model", "m", "--host", host], {})
    message = str(caught.value)
    assert message.startswith(f"host {host} can be reached from other machines, and without keys anyone")
    assert "--allow-insecure-bind" in message
    assert load(["--model", "m", "--host", host, "--allow-insecure-bind"], {})[0].host == host


def test_keys_without_tls_are_not_served_to_other_machines_unless_the_operator_says_so() -> None:
    line = ["--model", "m", "--host", "0.0.0.0", "--keys-file", "keys.json"]
    with pytest.raises(ConfigError) as caught:
        load(line, {})
    message = str(caught.value)
    assert message.startswith(
        "host 0.0.0.0 can be reached from other machines, and without TLS anyone on the way reads"
    )
    for way in (
        ["--tls-cert-file", "cert.pem", "--tls-key-file", "key.pem"],
        ["--tls-ends-in-front"],
        ["--allow-insecure-bind"],
    ):
        assert way[0] in message
        assert load([*line, *way], {})[0].host == "0.0.0.0"
    with pytest.raises(ConfigError, match="without keys anyone"):
        load(["--model", "m", "--host", "0.0.0.0", "--tls-cert-file", "c", "--tls-key-file", "k"], {})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tls-cert-file", "c"], "tls.key_file is missing; TLS needs the certificate and its key"),
        (["--tls-key-file", "k"], "tls.cert_file is missing"),
        (["--tls-client-ca-file", "c"], "tls.client_ca_file needs tls.cert_file and tls.key_file"),
        (["--limits-top-k", "0"], "limits.top_k (command line): "),
        (["--watch-step-s", "0"], "watch.step_s (command line): "),
    ],
)
def test_sections_that_cannot_be_used_are_refused_in_one_line(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(["--model", "m", *arguments], {})
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_limits_reach_the_engine() -> None:
    options = load(["--model", "m", "--limits-top-k", "7", "--limits-sequences", "9"], {})[0].backend_options()
    assert (options.max_top_k, options.max_sequences, options.max_candidates) == (7, 9, 1024)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_loopback_needs_no_permission(host: str) -> None:
    assert is_loopback(host)


def test_the_backend_gets_its_share() -> None:
    options: Any = ServerConfig(model="m", batch_tokens=77, quantization="4bit").backend_options()
    assert (options.model, options.batch_tokens, options.quantization) == ("m", 77, "4bit")
    assert ServerConfig(model="m").backend_options().batch_tokens > 0


ROOT = Path(__file__).resolve().parent.parent.parent


def test_every_server_configuration_in_the_tree_loads() -> None:
    for file in [*ROOT.glob("config/*server*.yaml"), *ROOT.glob("docker/*server*.yaml")]:
        assert yaml.safe_load(file.read_text()), file
        load(["--config", str(file), "--model", "m"], {})
