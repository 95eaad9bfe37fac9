"""vLLM's engine process is killed under a running server: what clients see, and that nothing stays behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from protos import errors
from protos.scores import GenerateRequest, Prompt, Sampling, ScoreRequest, ScoreSpec, Sequence
from teacher_server.backends.factory import make_backend
from tests.contract.wires import GrpcWire
from tests.servers import Server, process, serving, wait_for
from tests.tiny_qwen3 import make

pytestmark = pytest.mark.vllm
GOOD = ScoreRequest((Sequence([1, 2, 3, 4]),), ScoreSpec(2))
RESTART_S = 240


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model."""
    return make(Path(tmp_path_factory.mktemp("mortal")))


def cores() -> set[int]:
    """Process ids of the engines of this process."""
    return {int(child.pid or 0) for child in multiprocessing.active_children() if "EngineCore" in child.name}


def ready(server: Server) -> bool:
    return httpx.get(f"{server.http}/ready").status_code == 200


def test_a_killed_engine_fails_its_calls_and_is_started_again(folder: Path) -> None:
    from tests.teacher_server.backends.vllm.conftest import options

    others = cores()
    restart = {"backoff_s": 0.0}
    with serving(lambda: make_backend(options(folder)), cache=False, restart=restart) as server:
        wire = GrpcWire(server.grpc, server.http, timeout=RESTART_S)
        info, before = wire.teacher(), wire.score(GOOD)[0]
        (core,) = cores() - others
        long = GenerateRequest((Prompt(token_ids=(1, 2)),), Sampling(3000, ignore_eos=True), stream=True)
        with ThreadPoolExecutor(1) as pool:
            held = pool.submit(wire.generate, long)
            wait_for(lambda: server.metric("teacher_generated_tokens_total"))
            os.kill(core, signal.SIGKILL)
            error = held.exception()
        assert isinstance(error, errors.Unavailable), error
        assert not ready(server)
        with pytest.raises(errors.Unavailable):
            wire.score(GOOD)
        wait_for(lambda: ready(server), RESTART_S)
        assert server.metric("teacher_engine_restarts_total") == 1
        assert wire.teacher() == info
        np.testing.assert_array_equal(wire.score(GOOD)[0].top_logprobs, before.top_logprobs)
        assert core not in cores()
        wire.close()
    assert cores() == others


@pytest.mark.parametrize("moment", ["while it runs", "during a restart"])
def test_a_stopped_server_leaves_no_process_behind(folder: Path, tmp_path: Path, moment: str) -> None:
    import psutil

    from tests.teacher_server.backends.vllm.conftest import ENGINE

    arguments = ["--model", str(folder), "--backend", "vllm", "--dtype", "float32", "--restart-backoff-s", "0"]
    with process(tmp_path, *arguments, "--vllm-engine-args", json.dumps(ENGINE)) as (server, addresses):
        known = psutil.Process(server.pid).children(recursive=True)
        (core,) = [child for child in known if "EngineCore" in " ".join(child.cmdline()) + child.name()]
        if moment == "during a restart":
            core.kill()
            wait_for(lambda: "engine_restarts_total 1.0" in httpx.get(f"{addresses['http']}/metrics").text)
            wait_for(lambda: set(psutil.Process(server.pid).children(recursive=True)) - set(known))
            known += psutil.Process(server.pid).children(recursive=True)
        server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
        wait_for(lambda: not [child for child in known if child.is_running() and child.status() != "zombie"])
    assert "Traceback" not in (tmp_path / "log").read_text()
