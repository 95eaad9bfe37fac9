"""The server as a process: its command line, its start, its failures, its end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest

from protos import codec
from protos.scores import ScoreRequest, ScoreSpec, Sequence
from protos.teacher.v1 import teacher_pb2_grpc
from tests.servers import ROOT, command, environment, process, wait_for

TEACHER = str(ROOT / "tiny_pair" / "teacher")
THEORY = ("--backend", "theoretical", "--model", "theory")


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run(
        command(*arguments), env=environment(**variables), capture_output=True, text=True, timeout=60, cwd=ROOT
    )


def test_help_names_every_option_and_imports_no_engine_and_no_web_framework() -> None:
    from teacher_server.config import ServerConfig

    code = (
        "import sys; sys.argv[1:] = ['--help']\n"
        "from teacher_server.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'fastapi', 'grpc', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([*command()[:1], "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.stdout.endswith("[]\n"), done.stdout + done.stderr
    assert all("--" + name.replace("_", "-") in done.stdout for name in ServerConfig.model_fields)


def test_dry_run_prints_the_settings_and_starts_nothing() -> None:
    done = run(*THEORY, "--dry-run", TEACHER_GRPC_PORT="7")
    assert done.returncode == 0
    assert "grpc_port: 7\n" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--modle", "x"), "unknown argument --modle; did you mean --model?"),
        (("--model", "x", "--host", "0.0.0.0"), "--allow-insecure-bind"),
    ],
)
def test_settings_that_cannot_be_used_end_in_one_line_and_code_2(arguments: tuple[str, ...], words: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_server_says_when_it_is_ready_and_leaves_when_told(tmp_path: Path) -> None:
    with process(tmp_path, *THEORY) as (server, addresses):
        assert addresses["pid"] == server.pid
        assert httpx.get(f"{addresses['http']}/ready").text == "ready\n"
        with grpc.insecure_channel(addresses["grpc"]) as channel:
            request = ScoreRequest((Sequence([1, 2, 3]),), ScoreSpec(2))
            stub = teacher_pb2_grpc.TeacherServiceStub(channel)
            (message,) = stub.Score(codec.encode_score_request(request))
            assert message.total_rows == 2
        log = (tmp_path / "log").read_text()
        assert addresses["grpc"] in log
        assert addresses["http"] in log
        server.send_signal(signal.SIGTERM)
        assert server.wait(20) == 0
    assert not (tmp_path / "ready.json").exists()
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_the_shipped_teacher_scores_what_it_says(tmp_path: Path) -> None:
    with process(tmp_path, "--model", TEACHER, "--dtype", "float32", "--device", "cpu") as (_, addresses):  # noqa: SIM117
        with httpx.Client(base_url=addresses["http"], timeout=60) as http:
            question = {"messages": [{"role": "user", "content": "2 + 3 = ?"}], "mode": "non_thinking"}
            body = {"prompts": [question], "sampling": {"max_tokens": 16, "temperature": 0}, "logprobs": True}
            (completion,) = http.post("/v1/generate", json=body).raise_for_status().json()["completions"]
            assert completion["text"]
            ids = completion["prompt_token_ids"] + completion["token_ids"]
            start = len(completion["prompt_token_ids"])
            call = {"sequences": [{"token_ids": ids, "score_start": start}], "top_k": 1}
            (scored,) = http.post("/v1/score", json=call).raise_for_status().json()["sequences"]
            assert [row[0] for row in scored["top_token_ids"]] == completion["token_ids"]
            np.testing.assert_allclose(scored["token_logprobs"], completion["logprobs"], atol=5e-5)


@pytest.mark.parametrize("option", ["--grpc-port", "--http-port"])
def test_a_port_in_use_is_one_clear_line(option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        other = "--http-port" if option == "--grpc-port" else "--grpc-port"
        done = run(*THEORY, option, str(port), other, "0", "--log-level", "error")
    assert done.returncode == 1
    assert f"127.0.0.1:{port}: " in done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_cannot_be_loaded_is_one_clear_line(tmp_path: Path) -> None:
    done = run("--model", str(tmp_path / "nothing"), "--grpc-port", "0", "--http-port", "0", "--log-level", "error")
    assert done.returncode == 1
    assert done.stderr.startswith(f"teacher_server: cannot load {tmp_path}/nothing: ")
    assert len(done.stderr.splitlines()) == 1


def test_a_server_that_is_stopped_while_it_loads_leaves_at_once(tmp_path: Path) -> None:
    line = command("--model", TEACHER, "--grpc-port", "0", "--http-port", "0")
    log = tmp_path / "log"
    with log.open("w") as out:
        server = subprocess.Popen(line, env=environment(), stderr=out, cwd=ROOT)
    wait_for(lambda: "loading" in log.read_text())
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0
    assert "Traceback" not in log.read_text()


def test_the_ready_file_appears_whole(tmp_path: Path) -> None:
    with process(tmp_path, *THEORY):
        assert set(json.loads((tmp_path / "ready.json").read_text())) == {"grpc", "http", "pid"}
        assert sorted(os.listdir(tmp_path)) == ["log", "ready.json"]


def test_a_ready_file_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "no" / "ready.json"
    done = run(*THEORY, "--grpc-port", "0", "--http-port", "0", "--ready-file", str(file), "--log-level", "error")
    assert done.returncode == 1
    assert done.stderr.startswith(f"teacher_server: cannot write the ready file {file}: ")
