"""The command runs from its first engine to its table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--tokens",
    "32",
    "--per-call",
    "2",
    "--batch-tokens",
    "256",
    "--clients",
    "2",
    "--repeats",
    "1",
    "--seconds",
    "0.1",
]


@pytest.mark.slow
def test_a_run_measures_what_is_there_and_says_why_the_rest_is_missing(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, "benchmarks/teacher_scoring.py", "--shape", "tiny", "--backend", "transformers", *SMALL]
    command += ["--only", "prefill,headline,vllm-http", "--engine-args", '{"no_such_argument": 1}', "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    prefill, top, vllm_http = json.loads(out.read_text("utf-8"))["rows"]
    assert prefill["tokens_per_s"] > 0
    assert top["tokens_per_s"] > 0
    assert top["positions"] * 32 == top["tokens"] * 31
    assert top["server_cores"] > 0
    assert "tokens_per_s" not in vllm_http
    assert vllm_http.get("failure") or vllm_http.get("skipped")
    assert "| top-64" in run.stdout
