"""The README's examples run as written, against a live server with the embedded teacher."""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.servers import process

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
GRPC_PORT, HTTP_PORT = 50051, 8000


def blocks(language: str) -> list[str]:
    """The code blocks of one language."""
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def port_or_free(port: int) -> int:
    """`port` where nobody listens on it, else a free one, so that a busy desk can run the tests too."""
    for wanted in (port, 0):
        with socket.socket() as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("127.0.0.1", wanted))
            except OSError:
                continue
            return int(s.getsockname()[1])
    raise AssertionError("no free port")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, int]]:
    """The README's server command; yields which port stands for which of the README's."""
    commands = [
        line for block in blocks("bash") for line in block.splitlines() if "-m teacher_server --model tiny_pair" in line
    ]
    assert len(commands) == 1
    ports = {GRPC_PORT: port_or_free(GRPC_PORT), HTTP_PORT: port_or_free(HTTP_PORT)}
    words = [*commands[0].split()[3:], "--grpc-port", str(ports[GRPC_PORT]), "--http-port", str(ports[HTTP_PORT])]
    with process(tmp_path_factory.mktemp("readme"), *words) as (server, _):
        yield ports
    assert server.returncode == 0


def as_written(text: str, ports: dict[int, int]) -> str:
    """An example, with its ports replaced only where the default ones were taken."""
    for port, actual in ports.items():
        text = text.replace(f":{port}", f":{actual}")
    return text


def run_curl(text: str, ports: dict[int, int]) -> dict[str, object]:
    run = subprocess.run(["bash", "-c", as_written(text, ports)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert isinstance(answer, dict)
    return answer


def curl_block(path: str) -> str:
    found = [b for b in blocks("bash") if "curl" in b and path in b]
    assert len(found) == 1, path
    return found[0]


def test_curl_teacher(live: dict[int, int]) -> None:
    answer = run_curl(curl_block("/v1/teacher"), live)
    assert answer["vocab_size"]
    assert answer["fingerprint"]


def test_curl_score(live: dict[int, int]) -> None:
    answer = run_curl(curl_block("/v1/score"), live)
    sequences = answer["sequences"]
    assert isinstance(sequences, list)
    first = sequences[0]
    assert len(first["top_token_ids"][0]) == 3
    assert len(first["tail_logprob"][0]) == 2
    assert len(first["token_logprobs"]) == len(first["top_logprobs"])


def test_curl_generate_answers_in_both_modes(live: dict[int, int]) -> None:
    answer = run_curl(curl_block("/v1/generate"), live)
    completions = answer["completions"]
    assert isinstance(completions, list)
    texts = [c["text"] for c in sorted(completions, key=lambda c: int(c["prompt_index"]))]
    assert "<think>" in texts[0]
    assert texts[0].strip().endswith("71")
    assert "<think>" not in texts[1]


def test_python_example(live: dict[int, int]) -> None:
    (example,) = blocks("python")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", as_written(example, live)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=env)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip().startswith("[-")
