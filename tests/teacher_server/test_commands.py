"""`ping`, `score` and `top` against real servers: what they print, and one clear line for what goes wrong."""

from __future__ import annotations

import io
import json
import math
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from teacher_server.__main__ import COMMANDS, main
from teacher_server.auth import Permission
from teacher_server.keys import make_key, write
from tests.certificates import make_authority
from tests.servers import Server, serving, theory

CAPS = pytest.CaptureFixture[str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: CAPS) -> object:
    """Runs a command line; its exit code, what it printed, and what it complained about."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["teacher_server", *arguments])
        code = main()
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Path]]:
    """A server with keys, and a folder with key files: all, score, wrong."""
    folder = tmp_path_factory.mktemp("keys")
    (every, all_stored), (score, score_stored) = make_key("all"), make_key("score", may=[Permission.SCORE])
    for name, key in (("all", every), ("score", score), ("wrong", make_key("x")[0])):
        (folder / name).write_text(key + "\n")
    write(folder / "keys.json", [all_stored, score_stored])
    with serving(theory(), key=every, keys_file=str(folder / "keys.json")) as server:
        yield server, folder


def test_ping_says_who_the_teacher_is_over_either_transport(run, server: Server) -> None:  # type: ignore[no-untyped-def]
    for address in (server.http, f"grpc://{server.grpc}", server.grpc):
        code, out, err = run("ping", "--address", address, "--count", "3")
        assert (code, err) == (0, "")
        lines = dict(line.strip().split(None, 1) for line in out.splitlines()[1:])
        assert lines["reached"].startswith("yes, ")
        assert lines["ready"] == "yes"
        assert lines["key"] == "none given, none wanted"
        assert "theory, theoretical 1, float64" in lines["teacher"]


def test_ping_says_what_is_wrong_with_a_key(run, locked: tuple[Server, Path]) -> None:  # type: ignore[no-untyped-def]
    server, folder = locked
    for address in (server.http, f"grpc://{server.grpc}"):
        code, out, _ = run("ping", "--address", address, "--key-file", str(folder / "score"))
        assert (code, "key      taken" in out) == (0, True)
        code, out, _ = run("ping", "--address", address)
        assert (code, "this teacher wants a key" in out) == (1, True)
        code, out, _ = run("ping", "--address", address, "--key-file", str(folder / "wrong"))
        assert (code, "does not know the key" in out) == (1, True)


def test_ping_waits_for_nobody_who_is_not_there(run) -> None:  # type: ignore[no-untyped-def]
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    for address in (f"http://127.0.0.1:{port}", f"grpc://127.0.0.1:{port}"):
        code, _, err = run("ping", "--address", address, "--timeout", "3")
        assert code == 1
        assert err.startswith("ping: nobody answers")
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--address", "ftp://x"], "ftp://x is no address"),
        (["--address", "grpc://x"], "grpc://x is no address"),
        (["--address", "http://x:y"], "http://x:y is no address"),
        (["--key-file", "/nowhere"], "cannot read /nowhere: No such file or directory"),
        (["--ca-file", "/nowhere"], "--ca-file needs TLS, and http://127.0.0.1:8000 is without"),
        (["--address", "https://x:1", "--ca-file", "/nowhere"], "cannot read /nowhere"),
        (["--timeout", "0"], "--timeout must be above 0"),
    ],
)
@pytest.mark.parametrize("command", ["ping", "score", "top"])
def test_options_that_cannot_be_used_are_one_line(run, command: str, arguments: list[str], said: str) -> None:  # type: ignore[no-untyped-def]
    code, out, err = run(command, *arguments, *(["--text", "a"] if command == "score" else []))
    assert (code, out) == (1, "")
    assert err.startswith(f"{command}: {said}")
    assert len(err.splitlines()) == 1


def test_what_is_no_teacher_or_another_port_is_said_so(run, server: Server) -> None:  # type: ignore[no-untyped-def]
    for command in (["score", "--text", "a"], ["top", "--once"]):
        code, _, err = run(*command, "--address", f"grpc://{server.grpc}")
        assert (code, "give its http:// address" in err) == (1, True)
        code, _, err = run(*command, "--address", f"http://{server.grpc}")
        assert (code, "maybe it is a port of gRPC" in err or "nobody answers" in err) == (1, True), err
        code, _, err = run(*command, "--address", server.http.replace("http", "https"))
        assert (code, "does not speak TLS there" in err) == (1, True), err


def test_tls_problems_name_the_option_that_helps(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    authority = make_authority(tmp_path / "ca")
    (certificate, key), (own, own_key) = authority.pair("server"), authority.pair("client")
    ca = ["--ca-file", str(authority.ca)]
    with serving(theory(), tls={"cert_file": str(certificate), "key_file": str(key)}) as server:
        _, _, err = run("ping", "--address", server.http)
        assert "name the authority of its certificate with --ca-file" in err
        assert run("ping", "--address", server.http, *ca)[0] == 0
        assert run("ping", "--address", f"grpcs://{server.grpc}", *ca)[0] == 0
        _, _, err = run("ping", "--address", server.http.replace("https", "http"))
        assert "it is one of https" in err
    tls = {"cert_file": str(certificate), "key_file": str(key), "client_ca_file": str(authority.ca)}
    with serving(theory(), wait_ready=True, tls=tls) as server:
        _, _, err = run("ping", "--address", server.http, *ca)
        assert "--client-cert-file" in err
        mine = ["--client-cert-file", str(own), "--client-key-file", str(own_key)]
        assert run("ping", "--address", server.http, *ca, *mine)[0] == 0


def test_score_shows_each_tokens_probability_and_what_was_likelier(run, server: Server) -> None:  # type: ignore[no-untyped-def]
    answer = httpx.post(f"{server.http}/v1/score", json={"sequences": ["abca"], "top_k": 3}).json()["sequences"][0]
    assert [len(row) for row in answer["top_tokens"]] == [3, 3, 3]
    code, out, err = run("score", "--address", server.http, "--text", "abca", "--top-k", "3")
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines() if line.strip()[:1].isdigit()]
    tokens = [row[:3] for row in rows[:4]]
    assert tokens == [
        [str(t), str(i), name] for t, (i, name) in enumerate(zip(answer["token_ids"], "abca", strict=True))
    ]
    assert rows[1][3:5] == [f"{answer['token_logprobs'][0]:.3f}", f"{math.exp(answer['token_logprobs'][0]):.3f}"]
    assert f"{sum(answer['token_logprobs']):.3f} nats" in out


def test_score_takes_ids_standard_input_and_prints_json(  # type: ignore[no-untyped-def]
    run, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, out, _ = run("score", "--address", server.http, "--ids", "5,6,7", "--text", "ab", "--json")
    assert [len(one["token_ids"]) for one in json.loads(out)["sequences"]] == [2, 3]
    monkeypatch.setattr("sys.stdin", io.StringIO("abc\n"))
    _, out, _ = run("score", "--address", server.http, "--json")
    assert "".join(json.loads(out)["sequences"][0]["tokens"]) == "abc"
    assert "must be whole numbers" in run("score", "--address", server.http, "--ids", "5,x")[2]
    code, _, err = run("score", "--address", server.http, "--ids", "5,999999")
    assert (code, "INVALID_SEQUENCE: sequence 0" in err, "(request " in err) == (1, True, True)


def test_top_shows_what_the_page_shows(run, server: Server, locked: tuple[Server, Path]) -> None:  # type: ignore[no-untyped-def]
    sent = {"x-client": "trainer-9 [bold]"}
    httpx.post(f"{server.http}/v1/score", json={"sequences": ["hello"]}, headers=sent).raise_for_status()
    request_id = httpx.post(f"{server.http}/v1/score", json={"sequences": []}, headers=sent).headers["x-request-id"]
    code, out, err = run("top", "--once", "--address", server.http)
    assert (code, err) == (0, "")
    for shown in ("● ready", "trainer-9 [bold]", "INVALID_REQUEST", request_id, "cache hits", "restarts 0"):
        assert shown in out, out
    code, _, err = run("top", "--once", "--address", locked[0].http, "--key-file", str(locked[1] / "score"))
    assert (code, err.startswith("top: PERMISSION_DENIED: the key of score allows score")) == (1, True)


def test_a_server_names_its_commands(run, capsys: CAPS) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit):
        run("--help")
    assert "Commands: keys, ping, score and top" in " ".join(capsys.readouterr().out.split())
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            run(command, "--help")
        assert ended.value.code == 0
