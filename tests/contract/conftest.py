"""The contract's matrix: every test runs over each transport and against each backend that it names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from teacher_server.backends.factory import make_backend
from teacher_server.backends.options import BackendOptions
from tests.contract.wires import WIRES, Wire
from tests.servers import Server, serving, theory
from tests.tiny_qwen3 import make


@pytest.fixture(scope="session")
def theoretical_server() -> Iterator[Server]:
    """A server whose answers are known, without a cache, so that each call computes."""
    with serving(theory(), cache={"enabled": False}) as server:
        yield server


@pytest.fixture(scope="session")
def transformers_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with a random tiny Qwen3 behind the transformers backend, without a cache."""
    folder = make(Path(tmp_path_factory.mktemp("qwen3")))
    options = BackendOptions(model=str(folder), dtype="float32", device="cpu", batch_tokens=1024)
    with serving(lambda: make_backend(options), cache={"enabled": False}) as server:
        yield server


@pytest.fixture(scope="session")
def vllm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the same model behind the real vLLM, without a cache."""
    from tests.teacher_server.backends.vllm.conftest import options

    folder = make(Path(tmp_path_factory.mktemp("qwen3_vllm")))
    with serving(lambda: make_backend(options(folder, batch_tokens=1024)), cache={"enabled": False}) as server:
        yield server


@pytest.fixture(params=["theoretical", "transformers", pytest.param("vllm", marks=pytest.mark.vllm)])
def server(request: pytest.FixtureRequest) -> Server:
    """Each backend's server."""
    found: Server = request.getfixturevalue(f"{request.param}_server")
    return found


@pytest.fixture(params=list(WIRES))
def wire(request: pytest.FixtureRequest, server: Server) -> Iterator[Wire]:
    """Each transport to the server."""
    made = WIRES[request.param](server.grpc, server.http)
    yield made
    made.close()
