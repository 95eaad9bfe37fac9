"""lm-eval's log-likelihoods at the server are those of its own `hf` model on the same checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.docs.examples import examples
from tests.servers import ROOT, environment, process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval (pip install 'strong2weak[clients]')"),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny teacher without the padding of its logits, over which the `hf` model would normalise too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = str(tmp_path_factory.mktemp("exact"))
    model = AutoModelForCausalLM.from_pretrained(ROOT / "tiny_pair" / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "tiny_pair" / "teacher")
    model.resize_token_embeddings(max(tokenizer.get_vocab().values()) + 1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def found(checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What lm_eval_numbers.py prints, without a network."""
    folder: Path = tmp_path_factory.mktemp("tasks")
    cache = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_DATASETS_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    with process(folder, "--model", checkpoint, "--name", "teacher") as (_, server):
        command = [
            sys.executable,
            str(ROOT / "tests/clients/lm_eval_numbers.py"),
            checkpoint,
            server["http"],
            str(folder),
        ]
        done = subprocess.run(command, env=environment(**cache), capture_output=True, text=True, cwd=ROOT, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("requests", ["tokens", "text"])
def test_log_likelihoods_equal_those_of_the_hf_model(found: dict[str, Any], requests: str) -> None:
    truth, ours = found["hf"], found[requests]
    np.testing.assert_allclose(ours["choices"], truth["choices"], atol=1e-3)
    np.testing.assert_allclose(ours["texts"], truth["texts"], atol=1e-3)
    assert ours["greedy"] == truth["greedy"]
    assert np.shape(truth["choices"]) == (8, 3)
    assert len({number for row in truth["choices"] for number in row}) == 24  # they are no constant


def test_the_command_of_the_page_runs_as_written(tmp_path: Path) -> None:
    blocks = {example.title or example.language: example for example in examples("docs/clients.md")}
    (command,) = [e.text for e in examples("docs/clients.md") if e.why == "tests/clients/test_lm_eval.py"]
    for name in ("additions.jsonl", "additions.yaml"):
        (tmp_path / name).write_text(blocks[name].text)
    (tmp_path / "tiny_pair").symlink_to(ROOT / "tiny_pair")
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_DATASETS_OFFLINE": "1"}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with process(tmp_path, "--model", "tiny_pair/teacher") as (_, server):
        script = command.replace("http://127.0.0.1:8000", server["http"])
        env = environment(PATH=path, **cache)
        done = subprocess.run(
            ["bash", "-ec", script], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280
        )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "|additions|" in done.stdout.replace(" ", "")
