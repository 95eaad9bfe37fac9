"""What no client can make the server do, and what no answer says: sockets, code, addresses, names of the inside."""

from __future__ import annotations

import ast
import asyncio
import os
import pickle
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from google.protobuf import descriptor_pb2

from protos import codec
from protos.scores import ScoreRequest, Sequence
from protos.teacher.v1 import teacher_pb2 as pb
from teacher_server.backends.factory import make_backend
from teacher_server.backends.options import BackendOptions
from teacher_server.backends.theoretical_backend import Behaviour
from tests.servers import ROOT, Server, process, serving, theory, wait_for
from tests.teacher_server.test_access import methods, routes
from tests.tiny_qwen3 import make

SOURCES = sorted([*ROOT.glob("teacher_server/**/*.py"), *ROOT.glob("protos/*.py"), *ROOT.glob("protos/codec/*.py")])
MODULES = {path.stem for path in SOURCES if "_" in path.stem.strip("_")}


def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) of each socket of a process that listens for TCP, or takes UDP, by the system's tables."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(descriptor))
        except OSError:
            continue
    found = set()
    for table, state in (("tcp", "0A"), ("tcp6", "0A"), ("udp", "07"), ("udp6", "07")):
        path = Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            fields = line.split()
            if fields[3] == state and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                raw = b"".join(words)
                mapped = len(raw) == 16 and raw[:12] == bytes(10) + b"\xff\xff"
                family = socket.AF_INET if len(raw) == 4 or mapped else socket.AF_INET6
                found.add((socket.inet_ntop(family, raw[-4:] if mapped else raw), int(port, 16)))
    return found


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_a_process_listens_on_the_two_sockets_that_it_says_and_no_other(tmp_path: Path, host: str) -> None:
    options = ("--backend", "theoretical", "--model", "theory", "--host", host)
    with process(tmp_path, *options) as (server, addresses):
        said = {addresses["grpc"], addresses["http"].removeprefix("http://")}
        assert {f"{address}:{port}" for address, port in listening(server.pid)} == said
        assert f"listening on {', '.join(sorted(said))}\n" in (tmp_path / "log").read_text()
        assert not list(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split())


@pytest.mark.slow
def test_a_process_with_a_model_listens_on_no_other_socket_either(tmp_path: Path) -> None:
    options = ("--model", str(ROOT / "tiny_pair" / "teacher"), "--dtype", "float32", "--device", "cpu")
    with process(tmp_path, *options) as (server, addresses):
        said = {addresses["grpc"], addresses["http"].removeprefix("http://")}
        httpx.post(f"{addresses['http']}/v1/generate", json={"prompts": ["1"], "sampling": {"max_tokens": 3}})
        assert {f"{address}:{port}" for address, port in listening(server.pid)} == said


def imports(path: Path) -> set[str]:
    """Top-level names that a file imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def test_no_part_of_the_server_fetches_urls_or_reads_pickles() -> None:
    """`torch.load` and `numpy.load` read pickles too; weights are safetensors, read by transformers and vLLM.

    The commands are clients that an operator runs, and no part of the server.
    """
    clients = {
        "pickle",
        "dill",
        "cloudpickle",
        "shelve",
        "marshal",
        "httpx",
        "requests",
        "urllib.request",
        "http.client",
    }
    clients |= {"aiohttp", "urllib3", "ftplib", "smtplib", "xmlrpc.client"}
    for path in SOURCES:
        assert path.parent.name == "commands" or not imports(path) & clients, path
        for call in ast.walk(ast.parse(path.read_text())):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            assert name not in ("eval", "exec", "compile", "__import__", "torch.load", "np.load", "numpy.load"), path
            assert not name.startswith(("os.system", "os.popen", "subprocess.")), path
            assert name != "yaml.load", path


def test_code_of_a_checkpoint_runs_at_the_operators_word_alone() -> None:
    """Every `trust_remote_code` in the server is the operator's setting, whose default is False."""
    from teacher_server.config import ServerConfig

    assert ServerConfig(model="m").trust_remote_code is False
    assert BackendOptions(model="m").trust_remote_code is False
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert "trust_remote_code" in ast.unparse(node.value), path
                assert not isinstance(node.value, ast.Constant), path


@pytest.mark.slow
def test_a_checkpoint_that_brings_code_does_not_load(tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    marker = tmp_path / "it ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Evil: pass\nclass EvilConfig: pass\n")
    config = (folder / "config.json").read_text()
    own = '"auto_map": {"AutoConfig": "evil.EvilConfig", "AutoModelForCausalLM": "evil.Evil"}, "model_type": "evil"'
    (folder / "config.json").write_text(re.sub(r'"model_type": "\w+"', own, config))
    backend = make_backend(BackendOptions(model=str(folder), device="cpu"))
    with pytest.raises(ValueError, match=r"trust|evil"):
        asyncio.run(backend.start())
    assert not marker.exists()


class Trap:
    """A server for those who fetch what a client names; counts who came."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/x"
        self.came = 0
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            self.came += 1
            connection.close()

    def close(self) -> None:
        """Ends it."""
        self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self._thread.join()


@pytest.fixture
def trap() -> Iterator[Trap]:
    """A trap."""
    made = Trap()
    yield made
    made.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server whose engine fails on one id, with a model in a folder that nobody shall know."""
    make = theory(Behaviour(failing_id=250), model="/srv/secret_place/teacher-model")
    with serving(make, max_request_mib=1) as running:
        yield running


def test_a_client_learns_the_models_name_and_not_its_place(server: Server) -> None:
    for path in ("/v1/teacher", "/v1/models"):
        text = httpx.get(server.http + path).text
        assert "teacher-model" in text
        assert "secret_place" not in text


def test_an_address_in_a_call_is_text_or_refused_and_never_fetched(server: Server, trap: Trap) -> None:
    image = {"type": "image_url", "image_url": {"url": trap.url}}
    bodies: list[tuple[str, Any]] = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}], "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": trap.url}], "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "documents": [{"url": trap.url}]}),
        ("/v1/completions", {"prompt": trap.url, "max_tokens": 1, "model": trap.url}),
        ("/v1/score", {"sequences": [trap.url]}),
        ("/v1/generate", {"prompts": [{"text": trap.url}], "sampling": {"max_tokens": 1}, "fingerprint": trap.url}),
    ]
    for path, body in bodies:
        headers = {"referer": trap.url, "origin": trap.url, "x-forwarded-host": trap.url, "x-client": trap.url}
        assert httpx.post(server.http + path, json=body, headers=headers).status_code < 600
    assert trap.came == 0


def test_a_template_from_a_client_is_refused_and_one_in_a_text_is_text(server: Server) -> None:
    chat = {"messages": [{"role": "user", "content": "{{ 7 * 7 }}"}], "max_tokens": 1}
    for more in ({"chat_template": "{{ 1 }}"}, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}):
        response = httpx.post(f"{server.http}/v1/chat/completions", json=chat | more)
        assert (response.status_code, response.json()["reason"]) == (501, "UNSUPPORTED")
    with_text = httpx.post(f"{server.http}/v1/chat/completions", json=chat).json()["usage"]["prompt_tokens"]
    plain = {"messages": [{"role": "user", "content": "xx 7 * 7 xx"}], "max_tokens": 1}
    same = httpx.post(f"{server.http}/v1/chat/completions", json=plain).json()["usage"]["prompt_tokens"]
    assert with_text == same


class Boom:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_pickle_is_bytes_that_are_no_message(server: Server, tmp_path: Path) -> None:
    evil = pickle.dumps(Boom(str(tmp_path / "boom")))
    for kind in ("application/x-protobuf", "application/json", "application/python-pickle", "application/octet-stream"):
        for method, path in sorted(routes(server)):
            if method == "POST":
                response = httpx.post(server.http + path, content=evil, headers={"content-type": kind})
                assert response.status_code in (415, 422), (path, response.text)
    with grpc.insecure_channel(server.grpc) as channel:
        for name in ("Score", "Generate", "GetHead"):
            with pytest.raises(grpc.RpcError):
                list(channel.stream_stream(f"/teacher.v1.TeacherService/{name}")(iter([evil]), timeout=10))
    assert not (tmp_path / "boom").exists()


def leaks(text: str) -> list[str]:
    """What of the inside a text shows: paths, tracebacks, names of modules and classes."""
    found = re.findall(
        r"(?<![\w:/])/(?:\w+/)+\w+(?:\.\w+)?|\b\w+\.py\b|Traceback|File \"|, line \d+, in|0x[0-9a-f]{6,}", text
    )
    found = [one for one in found if not one.startswith(("/v1/", "/docs"))]
    found += re.findall(r"\b(?:pydantic|starlette|fastapi|uvicorn|grpc_|torch|numpy|asyncio)\b\w*", text)
    found += re.findall(r"\b[A-Za-z_]+Error\b|\b[A-Z]\w+Body\b|<class |object at 0x", text)
    found += re.findall(r"secret_place", text)
    return found + [module for module in MODULES if re.search(rf"\b{module}\b", text)]


BODIES: list[Any] = [
    b"",
    b"{",
    b"\xff\xfe",
    b"null",
    b'"x"',
    b"[1]",
    b"1e999",
    b"[" * 5000,
    b'{"sequences": [[1, 250]]}',
    b'{"sequences": [[1, 99999999999999999999]]}',
    b'{"sequences": [{"token_ids": ["a"]}]}',
    b'{"sequences": [{"messages": [{"role": "bad", "content": "\\u0000"}]}]}',
    b'{"sequences": ["x"], "want": ["y"], "temperatures": [NaN]}',
    b'{"prompts": [{"text": "x"}], "sampling": {"max_tokens": -1}, "n": 1e9}',
    b'{"prompts": [[250]], "sampling": {"max_tokens": 1}}',
    b'{"prompt": "\\ud800", "max_tokens": 1}',
    b'{"prompt": [250], "max_tokens": 1}',
    b'{"prompt": [25], "max_tokens": 1, "best_of": 9}',
    b'{"messages": [{"role": 1, "content": {}}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "model": "nobody", "max_tokens": 1}',
    b'{"messages": [{"role": "tool", "content": "x"}], "chat_template_kwargs": {"enable_thinking": {"a": []}}}',
    b" " * (1 << 20) + b" ",
]


def test_no_http_error_of_any_route_shows_the_inside(server: Server) -> None:
    seen = set()
    with httpx.Client(base_url=server.http, timeout=60) as client:
        for method, path in sorted(routes(server)):
            for body in BODIES if method == "POST" else BODIES[:2]:
                for kind in ("application/json", "application/x-protobuf")[: 2 if len(body) < 9 else 1]:
                    headers = {"content-type": kind, "x-timeout-s": "30"}
                    response = client.request(method, path, content=body, headers=headers)
                    seen.add(response.status_code)
                    if response.status_code >= 400 and method != "HEAD":
                        assert response.headers["content-type"] == "application/problem+json"
                        assert not leaks(response.text), (path, body[:80], response.text)
                    assert "server" not in response.headers
            for verb, headers in ((method, {"x-timeout-s": "x"}), (method, {"content-type": "a/b/c"}), ("DELETE", {})):
                response = client.request(verb, path, headers=headers)
                seen.add(response.status_code)
                if response.status_code >= 400 and method != "HEAD":
                    assert not leaks(response.text), (path, headers, response.text)
    assert {422, 413, 405, 415, 500, 501} <= seen, seen


def test_no_grpc_error_of_any_method_shows_the_inside(server: Server) -> None:
    call = [m.SerializeToString() for m in codec.encode_score_request(ScoreRequest((Sequence([1, 250]),)))]
    failing = pb.GenerateRequest(prompts=[pb.Prompt(text="x")], sampling=pb.Sampling(max_tokens=1), fingerprint="no")
    messages = [b"", b"\xff" * 5, b"\x0a\x05abc", *call, failing.SerializeToString(), os.urandom(100)]
    messages += [descriptor_pb2.FileDescriptorProto(name="nothing").SerializeToString()]
    codes = set()
    with grpc.insecure_channel(server.grpc) as channel:
        for name in sorted(methods(server)):
            for message in messages:
                stream = channel.stream_stream(name)(iter([message]), timeout=0.5)
                try:
                    list(stream)
                except grpc.RpcError as error:
                    code, text = error.code(), error.details()  # type: ignore[attr-defined]
                    codes.add(code)
                    assert code is not grpc.StatusCode.UNKNOWN, (name, message, text)
                    assert not leaks(text), (name, message, text)
    assert {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL} <= codes
    wait_for(lambda: server.metric("teacher_in_flight", method="score") == 0)
