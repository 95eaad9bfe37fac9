"""lm-eval's log-likelihoods at the server are those of its own `hf` model on the same checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.servers import ROOT, environment, process

pytestmark = [
    pytest.mark.slow,
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
