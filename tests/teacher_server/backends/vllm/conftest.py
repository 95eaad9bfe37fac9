"""The real engine on the CPU, one for each kind of tiny model, on an event loop that lives as long as the session."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from teacher_server.backends.options import BackendOptions
from tests.teacher_server.backends.conftest import config_of, save_tokenizer

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, Any]], Any]

ENGINE: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 8, "distributed_executor_backend": "uni"}
BATCH_TOKENS = 256
"""Fewer than the longer prompts have, so that their rows come in several steps."""


@pytest.fixture(scope="session")
def run() -> Iterator[Run]:
    """Runs a coroutine on the session's loop and gives its result: an engine belongs to one loop."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="engines")
    thread.start()

    def run(coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(240)

    yield run
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the folder of a kind of model once; vLLM's CPU attention wants heads of at least 32."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            import torch
            from transformers import AutoModelForCausalLM

            path = tmp_path_factory.mktemp(f"vllm_{kind}")
            torch.manual_seed(7)
            config = config_of(kind)
            config.head_dim = 32
            model = AutoModelForCausalLM.from_config(config)
            model.generation_config.eos_token_id = [258, 256]
            model.save_pretrained(path)
            save_tokenizer(path)
            made[kind] = path
        return made[kind]

    return make


def options(path: Path, **chosen: Any) -> BackendOptions:
    """How the tests run vLLM on the CPU."""
    args = ENGINE | chosen.pop("engine", {})
    wanted = {"backend": "vllm", "dtype": "float32", "batch_tokens": BATCH_TOKENS, "vllm_engine_args": args} | chosen
    return BackendOptions(model=str(path), **wanted)


@pytest.fixture(scope="session")
def engine(run: Run, folder: Callable[[str], Path]) -> Iterator[Callable[[str], Any]]:
    """Starts a backend for each kind of model once, and ends them all."""
    from teacher_server.backends.vllm_backend import VllmBackend

    running: dict[str, Any] = {}

    def start(kind: str) -> Any:
        if kind not in running:
            backend = VllmBackend(options(folder(kind)))
            run(backend.start())
            running[kind] = backend
        return running[kind]

    yield start
    for backend in running.values():
        run(backend.close())
