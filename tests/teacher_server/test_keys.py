"""Keys: the file, the commands, and a file that changes under a running server."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import grpc
import httpx
import pytest

from protos.errors import Unauthenticated
from protos.teacher.v1 import teacher_pb2 as pb
from protos.teacher.v1 import teacher_pb2_grpc
from teacher_server.key_watch import KeyAuthenticator
from teacher_server.keys import KeyFileError, make_key, read, write
from teacher_server.keys_command import main
from tests.servers import bearer, command, environment, process, serving, theory, wait_for

THEORY = ("--backend", "theoretical", "--model", "theory")


def add(file: Path, name: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The key that the command prints."""
    assert main(["--keys-file", str(file), "add", name, *more]) == 0
    return capsys.readouterr().out.strip()


def test_a_key_is_printed_once_and_its_file_holds_a_hash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    key = add(file, "trainer-1", capsys, "--weight", "2.5", "--may", "score,observe")
    other = add(file, "trainer-2", capsys)
    assert key.split("_", 2)[2] not in file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    authenticator = KeyAuthenticator(file)
    client = authenticator.identify(bearer(key), "")
    assert (client.name, client.weight, {p.value for p in client.may}) == ("trainer-1", 2.5, {"score", "observe"})
    assert authenticator.identify(bearer(other), "").name == "trainer-2"
    assert main(["--keys-file", str(file), "list"]) == 0
    shown = capsys.readouterr().out
    assert "trainer-1" in shown
    assert key not in shown
    first, second = (json.loads(file.read_text())["keys"][i] for i in range(2))
    assert first["salt"] != second["salt"]


def test_two_keys_of_one_name_let_a_client_change_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "keys.json"
    old, new = add(file, "a", capsys), add(file, "a", capsys)
    authenticator = KeyAuthenticator(file)
    assert authenticator.identify(bearer(old), "").name == authenticator.identify(bearer(new), "").name == "a"
    assert main(["--keys-file", str(file), "remove", old.split("_")[1]]) == 0
    authenticator.reload()
    assert authenticator.identify(bearer(new), "").name == "a"
    with pytest.raises(Unauthenticated, match="does not know the key"):
        authenticator.identify(bearer(old), "")
    assert main(["--keys-file", str(file), "remove", "a"]) == 0
    assert read(file) == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["add", "a b"], "the name 'a b' cannot be used"),
        (["add", "a", "--weight", "0"], "the weight must be above 0"),
        (["add", "a", "--weight", "nan"], "the weight must be above 0"),
        (["add", "a", "--may", "score,fly"], "a key may do some of score, generate, observe, got 'score,fly'"),
        (["add", "known", "--weight", "3"], "a client has one weight"),
        (["remove", "nobody"], "has no key of nobody"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    file = tmp_path / "keys.json"
    add(file, "known", capsys)
    before = file.read_text()
    assert main(["--keys-file", str(file), *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1
    assert file.read_text() == before


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"keys": 3}', '{"keys": [{"name": "a"}]}', "\xff"])
def test_a_file_that_holds_no_keys_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "keys.json"
    file.write_text(content, "latin-1")
    with pytest.raises(KeyFileError, match="is no file of keys"):
        read(file)


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    write(file, [make_key("a")[1]])
    file.chmod(0o620)
    with pytest.raises(KeyFileError, match="can be written by its group"):
        read(file)


@pytest.mark.parametrize(
    "value", ["", "Bearer", "Bearer ", "Basic abc", "Bearer a b", "bearer s2w_000000000000_" + "A" * 43, "Bearer \xff"]
)
def test_what_is_no_known_key_is_unauthenticated_and_not_repeated(tmp_path: Path, value: str) -> None:
    file = tmp_path / "keys.json"
    write(file, [make_key("a")[1]])
    with pytest.raises(Unauthenticated) as caught:
        KeyAuthenticator(file).identify({"authorization": value}, "1.2.3.4")
    assert "AAAA" not in caught.value.message


def test_the_file_is_looked_at_once_a_second_and_a_broken_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, now = tmp_path / "keys.json", [0.0]
    (old, old_stored), (new, new_stored) = make_key("a"), make_key("b")
    write(file, [old_stored])
    authenticator = KeyAuthenticator(file, lambda: now[0])
    write(file, [new_stored])
    assert authenticator.identify(bearer(old), "").name == "a"
    now[0] = 1.0
    assert authenticator.identify(bearer(new), "").name == "b"
    for breaking in (lambda: file.write_text("{"), file.unlink):
        breaking()
        now[0] += 1.0
        assert authenticator.identify(bearer(new), "").name == "b"
        assert "the keys stay as they were" in caplog.text
    with pytest.raises(Unauthenticated):
        authenticator.identify(bearer(old), "")


def test_keys_are_rotated_under_a_running_server_on_both_transports(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    (old, old_stored), (new, new_stored) = make_key("a"), make_key("a")
    write(file, [old_stored])

    with serving(theory(), keys_file=str(file)) as server, grpc.insecure_channel(server.grpc) as channel:
        stub = teacher_pb2_grpc.TeacherServiceStub(channel)

        def known(key: str) -> set[bool]:
            metadata = tuple(bearer(key).items())
            try:
                over_grpc = bool(stub.GetTeacher(pb.GetTeacherRequest(), metadata=metadata).name)
            except grpc.RpcError:
                over_grpc = False
            return {over_grpc, httpx.get(f"{server.http}/v1/teacher", headers=bearer(key)).status_code == 200}

        assert (known(old), known(new)) == ({True}, {False})
        write(file, [old_stored, new_stored])
        wait_for(lambda: known(new) == {True})
        assert known(old) == {True}
        write(file, [new_stored])
        wait_for(lambda: known(old) == {False})
        assert known(new) == {True}


def test_a_process_takes_sighup_and_says_no_key_in_any_log_or_metric(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    (old, old_stored), (new, new_stored) = make_key("trainer-1"), make_key("trainer-2")
    write(file, [old_stored])
    with process(tmp_path, *THEORY, "--keys-file", str(file), "--log-level", "debug") as (server, addresses):
        http = addresses["http"]
        call = {"sequences": ["abc"]}
        for key in (old, new, "nonsense-" + new):
            headers = bearer(key) | {"x-client": "rank-0"}
            httpx.post(f"{http}/v1/score", json=call, headers=headers)
            httpx.post(f"{http}/v1/score", json={"sequences": []}, headers=headers)
            httpx.get(f"{http}/v1/teacher?key=x", headers=headers)
        write(file, [new_stored])
        server.send_signal(signal.SIGHUP)
        wait_for(lambda: "keys read again: 1 known, 1 new, 1 removed" in (tmp_path / "log").read_text())
        assert httpx.get(f"{http}/v1/teacher", headers=bearer(old)).status_code == 401
        text = httpx.get(f"{http}/metrics", headers=bearer(new)).text
    log = (tmp_path / "log").read_text()
    assert "trainer-1 (rank-0)" in log
    for key in (old, new):
        assert not {key, key.split("_", 2)[2]} & set(re.split(r"[\s'\",]+", log + text))
        assert key.split("_", 2)[2] not in log + text


def test_a_server_without_a_usable_file_of_keys_does_not_start(tmp_path: Path) -> None:
    for content, words in ((None, "cannot read"), ("nonsense", "is no file of keys")):
        file = tmp_path / "keys.json"
        if content:
            file.write_text(content)
        line = command(
            *THEORY, "--grpc-port", "0", "--http-port", "0", "--keys-file", str(file), "--log-level", "error"
        )
        done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert done.stderr.startswith("teacher_server: ")
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_command_of_the_readme_makes_a_file_that_a_server_takes(tmp_path: Path) -> None:
    line = command("keys", "add", "trainer-1")
    env = environment(TEACHER_KEYS_FILE=str(tmp_path / "keys.json"))
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=60, check=True)
    key = done.stdout.strip()
    assert "shown this once" in done.stderr
    with process(tmp_path, *THEORY, TEACHER_KEYS_FILE=str(tmp_path / "keys.json")) as (_, addresses):
        assert httpx.get(f"{addresses['http']}/v1/teacher", headers=bearer(key)).status_code == 200
        assert httpx.get(f"{addresses['http']}/v1/teacher").status_code == 401
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".keys")]
