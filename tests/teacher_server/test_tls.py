"""TLS and mutual TLS on both transports, through the trainer's own client, and files that change meanwhile."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from protos.errors import TeacherError, Unavailable
from protos.scores import Sequence
from student_trainer.teacher_client import Credentials, connect
from student_trainer.teacher_client.transport import open_transport
from teacher_server.keys import make_key, write
from teacher_server.transports.tls import Tls, TlsError
from tests.certificates import Authority, make_authority
from tests.servers import Server, serving, theory, wait_for


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """The authority that is in use at first."""
    return make_authority(tmp_path_factory.mktemp("tls") / "ours")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another one."""
    return make_authority(tmp_path_factory.mktemp("tls") / "other")


def install(authority: Authority, folder: Path) -> dict[str, str | None]:
    """Puts a server's files into `folder`, as settings."""
    certificate, key = authority.pair("server")
    for source, name in ((certificate, "cert.pem"), (key, "key.pem"), (authority.ca, "clients.pem")):
        shutil.copy(source, folder / f".{name}")
        (folder / f".{name}").replace(folder / name)
    return {"cert_file": str(folder / "cert.pem"), "key_file": str(folder / "key.pem")}


def of(authority: Authority, client: Authority | None = None, key_file: str = "") -> Credentials:
    """What a client has that trusts `authority` and shows a certificate of `client`."""
    pair = map(str, client.pair("client")) if client else ("", "")
    return Credentials(key_file, str(authority.ca), *pair)


@pytest.fixture(params=["grpcs", "https"])
def scheme(request: pytest.FixtureRequest) -> str:
    """Each transport."""
    return str(request.param)


def answers(server: Server, scheme: str, credentials: Credentials) -> bool:
    """Whether a new connection gets an answer."""
    address = server.http if scheme == "https" else f"grpcs://{server.grpc}"
    with closing(open_transport(address, "", credentials)) as transport:
        try:
            return bool(transport.teacher(5).name)
        except Unavailable:
            return False


@pytest.fixture
def mutual(ours: Authority, tmp_path: Path) -> Iterator[Server]:
    """A server that wants certificates of its clients, with its files in `tmp_path`."""
    settings = install(ours, tmp_path) | {"client_ca_file": str(tmp_path / "clients.pem")}
    with serving(theory(), tls=settings, wait_ready=False) as server:
        wait_for(lambda: server.app.service.state.name == "READY")
        yield server


def test_a_client_scores_over_tls_with_a_key(ours: Authority, other: Authority, tmp_path: Path, scheme: str) -> None:
    keys, mine = tmp_path / "keys.json", tmp_path / "my-key"
    key, stored = make_key("trainer-1")
    write(keys, [stored])
    mine.write_text(key + "\n")
    with serving(theory(), tls=install(ours, tmp_path), keys_file=str(keys)) as server:
        assert server.http.startswith("https://")
        address = server.http if scheme == "https" else f"grpcs://{server.grpc}"
        with connect(address, patience_s=0, credentials=of(ours, key_file=str(mine))) as client:
            assert client.score([Sequence([1, 2, 3])])[0].positions == 2
        assert not answers(server, scheme, of(other))
        plain = address.replace("https", "http").replace("grpcs", "grpc")
        with pytest.raises(TeacherError), closing(open_transport(plain)) as transport:
            transport.teacher(5)


def test_mutual_tls_refuses_who_has_no_certificate_of_its_authorities(
    mutual: Server, ours: Authority, other: Authority, scheme: str
) -> None:
    assert answers(mutual, scheme, of(ours, ours))
    assert not answers(mutual, scheme, of(ours))
    assert not answers(mutual, scheme, of(ours, other))


def test_certificates_and_authorities_change_without_a_restart(
    mutual: Server, ours: Authority, other: Authority, tmp_path: Path, scheme: str
) -> None:
    assert answers(mutual, scheme, of(ours, ours))
    shutil.copy(other.pair("server")[1], tmp_path / "key.pem")  # half of a change: the files do not fit together
    time.sleep(1.1)
    assert answers(mutual, scheme, of(ours, ours))
    install(other, tmp_path)
    wait_for(lambda: answers(mutual, scheme, of(other, other)), 20)
    assert not answers(mutual, scheme, of(ours, ours))
    assert not answers(mutual, scheme, of(other, ours))


def test_a_handshake_that_does_not_go_on_is_ended_and_stalls_nobody(ours: Authority, tmp_path: Path) -> None:
    with serving(theory(), tls=install(ours, tmp_path), limits={"head_s": 1.0}) as server:
        places = [urlsplit(server.http), urlsplit(f"//{server.grpc}")]
        slow = [socket.create_connection((p.hostname, p.port), timeout=20) for p in places for _ in range(20)]
        for one in slow:
            one.sendall(b"\x16\x03\x01")
        assert answers(server, "https", of(ours))
        assert answers(server, "grpcs", of(ours))
        for one in slow:
            with one:
                while one.recv(1000):  # until its end, or the test fails after 20 s
                    pass


@pytest.mark.parametrize("broken", ["missing", "nonsense", "mixed"])
def test_files_that_cannot_be_used_are_refused_by_name(
    ours: Authority, other: Authority, tmp_path: Path, broken: str
) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    shutil.copy(ours.pair("server")[0], certificate)
    if broken != "missing":
        key.write_bytes(b"nonsense" if broken == "nonsense" else other.pair("server")[1].read_bytes())
    with pytest.raises(TlsError, match=r"key\.pem"):
        Tls(str(certificate), str(key), None)


def test_a_clients_files_and_addresses_must_go_together(ours: Authority, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ca_file needs TLS, and 10\.0\.0\.1:1 is without; use grpcs:// or https://"):
        open_transport("10.0.0.1:1", "", of(ours))
    with pytest.raises(ValueError, match="belong together"):
        Credentials(client_cert_file="x")
    with pytest.raises(ValueError, match=r"cannot read ca_file .*nothing"):
        open_transport("https://localhost:1", "", Credentials(ca_file=str(tmp_path / "nothing")))
    empty = tmp_path / "empty"
    empty.write_text("")
    for scheme in ("grpcs", "https"):
        with pytest.raises(ValueError, match="must hold one key and nothing else"):
            open_transport(f"{scheme}://localhost:1", "", Credentials(str(empty)))
        with pytest.raises(ValueError, match="TLS cannot use"):
            open_transport(f"{scheme}://localhost:1", "", Credentials(ca_file=str(empty)))


def test_a_client_takes_a_replaced_key_and_warns_of_one_in_the_clear(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, scheme: str
) -> None:
    keys, mine = tmp_path / "keys.json", tmp_path / "my-key"
    (old, old_stored), (new, new_stored) = make_key("a"), make_key("a")
    write(keys, [old_stored])
    mine.write_text(old)
    with serving(theory(), keys_file=str(keys)) as server:
        address = server.http if scheme == "https" else server.grpc
        with closing(open_transport(address, "", Credentials(str(mine)))) as transport:
            assert transport.teacher(5).name
            write(keys, [new_stored])
            mine.write_text(new)
            wait_for(lambda: known(transport))
    assert not caplog.records or "without TLS" not in caplog.text
    open_transport("10.0.0.1:1", "", Credentials(str(mine))).close()
    assert "the key goes to 10.0.0.1:1 without TLS" in caplog.text
    assert new not in caplog.text


def known(transport: object) -> bool:
    """Whether the teacher answers."""
    try:
        return bool(transport.teacher(5).name)  # type: ignore[attr-defined]
    except TeacherError:
        return False
