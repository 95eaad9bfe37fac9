"""A real stock vLLM server as the teacher: its scores are our own backend's, and both stages train against it."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
import yaml

from protos import errors
from protos.scores import Field, FinishReason, Mode, Prompt, Sampling, ScoreRequest, ScoreSpec, Sequence
from student_trainer.config import Config
from student_trainer.models import describe
from student_trainer.stock_teacher import stock_model
from student_trainer.teacher_client import Credentials, StockModel, TeacherClient, connect
from student_trainer.teacher_client.openai_channel import OpenAiTransport
from teacher_server.backends.factory import make_backend
from teacher_server.backends.options import BackendOptions
from tests.servers import ROOT, serving, wait_for
from tests.student_trainer.conftest import STUDENT, TEACHER

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

KEY = "a-key-of-the-stock-server"
WIDTH, TOKENS = 320, 305
"""Logits of the tiny pair, padding included, and real tokens."""


@dataclass
class Stock:
    """The running server, and a file with its key."""

    http: str
    key_file: str
    model: StockModel

    def connect(self) -> TeacherClient:
        return connect(self.http, stock=self.model, credentials=Credentials(api_key_file=self.key_file))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """vLLM's own OpenAI server with the tiny teacher, as it is but for float32 and what a CPU needs."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "key").write_text(KEY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TEACHER)]
    line += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "tiny", "--api-key", KEY]
    line += ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "8", "--distributed-executor-backend", "uni"]
    http = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(line, cwd=folder, stdout=log, stderr=log)
        try:
            wait_for(lambda: running.poll() is not None or answers(http), 600)
            assert running.poll() is None, (folder / "log").read_text()[-4000:]
            config = Config.model_validate({"models": {"student_model": str(STUDENT)}})
            yield Stock(f"{http}/v1", str(folder / "key"), stock_model(describe(config, STUDENT), None, None))
        finally:
            running.terminate()
            running.wait(120)


def answers(http: str) -> bool:
    """Whether the server is up."""
    try:
        return httpx.get(f"{http}/health").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def client(stock: Stock) -> Iterator[TeacherClient]:
    with stock.connect() as client:
        yield client


@pytest.fixture(scope="module")
def ours() -> Iterator[TeacherClient]:
    """A client of our own server with the same model behind the transformers backend."""
    options = BackendOptions(model=str(TEACHER), dtype="float32", device="cpu")
    with serving(lambda: make_backend(options), cache={"enabled": False}) as server, connect(server.grpc) as client:
        yield client


def sequences(model: StockModel) -> list[Sequence]:
    """A conversation in each mode, and a longer text of no kind."""
    texts = [
        "<|im_start|>user\nCalculate 2+34<|im_end|>\n<|im_start|>assistant\n<think>\n2+34=36\n</think>\n\n36<|im_end|>",
        "<|im_start|>user\nCalculate 7-5<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n2<|im_end|>",
        "a text of no kind, ünlike any other. " * 6,
    ]
    return [Sequence(model.encode(text), start) for text, start in zip(texts, (1, 14, 3), strict=True)]


def test_the_server_is_found_as_it_was_started(stock: Stock, client: TeacherClient) -> None:
    info = client.teacher()
    assert (info.name, info.normalized_size, info.vocab_size) == ("tiny", WIDTH, TOKENS)
    assert (info.limits.sequence_tokens, info.limits.top_k, info.limits.candidates) == (511, 20, 0)
    assert (info.can_generate, info.modes) == (True, tuple(Mode))
    assert info.engine.startswith("stock vLLM 0.")
    with stock.connect() as again:
        assert again.teacher().fingerprint == info.fingerprint


def test_scores_are_those_of_our_own_backend_once_padded_logits_count(
    stock: Stock, client: TeacherClient, ours: TeacherClient
) -> None:
    """Ours softmaxes the 305 real tokens, stock vLLM all 320 logits: the difference is the mass of the other 15."""
    from transformers import AutoModelForCausalLM

    assert ours.teacher().normalized_size == TOKENS
    asked, spec = sequences(stock.model), ScoreSpec(8)
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    for sequence, found, own in zip(asked, client.score(asked, spec), ours.score(asked, spec), strict=True):
        with torch.no_grad():
            logits = model(torch.from_numpy(sequence.token_ids).long()[None]).logits[0, sequence.score_start - 1 : -1]
        wide = torch.log_softmax(logits.double(), -1)
        real = wide[:, :TOKENS].logsumexp(-1).numpy()  # log of the mass of real tokens
        assert found.token_logprobs is not None
        np.testing.assert_allclose(found.token_logprobs, own.token_logprobs + real, atol=1e-4)
        expected = wide.topk(8)
        np.testing.assert_allclose(found.top_logprobs, expected.values.numpy(), atol=1e-4)
        tail = wide.scatter(1, expected.indices, -torch.inf).logsumexp(-1).exp().numpy()
        assert found.tail_logprob is not None
        np.testing.assert_allclose(np.exp(found.tail_logprob[:, 0]), tail, atol=1e-5)
        assert found.log_normalizer is not None
        assert not found.log_normalizer.any()
        close = np.abs(real) < 1e-5  # where padding has no mass, the numbers are the same as they stand
        np.testing.assert_allclose(found.top_logprobs[close], own.top_logprobs[close], atol=1e-4)
        assert (found.top_token_ids[close, 0] == own.top_token_ids[close, 0]).all()


def test_without_alternatives_only_the_tokens_are_scored(stock: Stock, client: TeacherClient) -> None:
    asked = sequences(stock.model)
    few = client.score(asked, ScoreSpec(want=frozenset({Field.TOKEN_LOGPROBS, Field.LOG_NORMALIZER})))
    for one, other in zip(few, client.score(asked, ScoreSpec(8)), strict=True):
        assert set(one.arrays()) == {"token_logprobs", "log_normalizer"}
        np.testing.assert_allclose(one.token_logprobs, other.token_logprobs, atol=1e-5)


def test_greedy_completions_are_those_of_our_own_backend(
    stock: Stock, client: TeacherClient, ours: TeacherClient
) -> None:
    prompts = [Prompt(token_ids=sequence.token_ids[:13]) for sequence in sequences(stock.model)[:2]]
    greedy = Sampling(24, temperature=0)
    for (one, twin), (other, _) in zip(
        client.generate(prompts, greedy, n=2, logprobs=True), ours.generate(prompts, greedy, n=2), strict=True
    ):
        assert one.token_ids.tolist() == twin.token_ids.tolist() == other.token_ids.tolist()
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.logprobs is not None
        scored = client.score([Sequence(np.concatenate([one.prompt_token_ids, one.token_ids]), 13)])[0]
        np.testing.assert_allclose(one.logprobs, scored.token_logprobs, atol=1e-4)


def test_samples_follow_their_seed_and_end_at_given_ids(stock: Stock, client: TeacherClient) -> None:
    prompt = [Prompt(token_ids=stock.model.encode("1"))]
    first, again, other = (
        [one.token_ids.tolist() for one in client.generate(prompt, Sampling(16, 2.0, seed=seed), n=3)[0]]
        for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other
    assert first[0] != first[1]
    stop = first[0][2]
    (cut,) = client.generate(prompt, Sampling(16, 2.0, seed=5, stop_token_ids=(stop,)))[0]
    assert cut.token_ids.tolist() == first[0][: first[0].index(stop) + 1]
    assert cut.finish_reason is FinishReason.STOP


def test_its_errors_are_those_of_the_tree(stock: Stock, client: TeacherClient, tmp_path: Path) -> None:
    with pytest.raises(errors.Unauthenticated):
        connect(stock.http, stock=stock.model)
    with pytest.raises(errors.TooLarge, match="maximum context length is 512"):
        client.score([Sequence(np.ones(600, np.int32))])
    with pytest.raises(errors.TooLarge, match=r"top_k is 64, .* accepts 20; .* --max-logprobs 64"):
        client.score(sequences(stock.model), ScoreSpec(64))
    transport = OpenAiTransport(stock.http, stock.model, credentials=Credentials(api_key_file=stock.key_file))
    with pytest.raises(errors.TeacherMismatch, match="does not exist"):
        transport._call("POST", "/v1/completions", {"model": "other", "prompt": [1], "max_tokens": 1}, 30)
    with pytest.raises(errors.TeacherMismatch, match="the call expects another"):
        transport.score(ScoreRequest((Sequence([1, 2]),), fingerprint="another"), 30)
    transport.close()


def test_both_stages_train_against_it(stock: Stock, tmp_path: Path) -> None:
    few = {"num_epochs": 1, "batch_size": 4, "gradient_accumulation_steps": 2, "top_k": 8, "temperature": 1.0}
    config = {
        "models": {"student_model": str(STUDENT), "torch_dtype": "float32", "load_in_4bit": False},
        "data": {
            "data_path": str(ROOT / "dataset" / "arithmetic.json"),
            "val_path": str(ROOT / "dataset" / "arithmetic_heldout.json"),
            "max_length": 96,
            "max_examples": 8,
        },
        "training": {
            "output_dir": str(tmp_path / "outputs"),
            "log_file": str(tmp_path / "log"),
            "use_tensorboard": False,
        },
        "non_policy_distillation": {**few, "max_new_tokens": 24},
        "policy_distillation": {**few, "max_new_tokens": 12},
        "evaluation": {"verifier": "final_answer", "problems": 2, "max_new_tokens": 24},
        "teacher": {"endpoint": stock.http, "kind": "openai", "api_key_file": stock.key_file},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    line = [sys.executable, "main_distillation.py", "--config", str(tmp_path / "config.yaml"), "--stage", "all"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "is a stock vLLM 0." in done.stdout
    assert "does not tell its weights" in done.stdout
    for row in ("teacher", "student before", "after stage 1", "after stage 2"):
        assert row in done.stdout
    for stage, model in (("non_policy_distillation", "final_model"), ("policy_distillation", "final_policy_model")):
        assert (tmp_path / "outputs" / stage / model / "model.safetensors").is_file()
