"""Lines of the log, and one id for each call in all that is said of it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest

from protos import codec
from protos.errors import InvalidRequest, TeacherFailed
from protos.scores import ScoreRequest, ScoreSpec, Sequence
from student_trainer.teacher_client import connect
from teacher_server import exchange
from teacher_server.backends.theoretical_backend import Behaviour
from teacher_server.logs import JsonLines, PlainLines, name_request
from tests.servers import Server, process, serving, theory

ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def record(text: str, *arguments: Any, **extra: Any) -> logging.LogRecord:
    found = logging.getLogger("some.place").makeRecord(
        "some.place", logging.INFO, __file__, 1, text, arguments, None, extra=extra
    )
    name_request(found)
    return found


def test_a_plain_line_is_one_line_whatever_a_client_called_itself() -> None:
    line = PlainLines().format(record("a call of %s", "me\nE root: all is lost\x1b[2J\u2028"))
    assert line.splitlines() == [line]
    assert "\x1b" not in line
    assert line.endswith(r"I some.place: a call of me\nE root: all is lost\x1b[2J\u2028")


def test_a_json_line_is_one_object_with_the_fields_of_its_call() -> None:
    line = JsonLines().format(record("a call of %s", 'Zoë "\n', fields={"client": "Zoë", "seconds": 0.25}))
    assert "\n" not in line
    found = json.loads(line)
    assert found.pop("time").endswith("+00:00")
    text = 'a call of Zoë "\n'
    assert found == {"level": "info", "logger": "some.place", "message": text, "client": "Zoë", "seconds": 0.25}


def test_what_is_logged_for_a_request_carries_its_id() -> None:
    token = exchange.CURRENT.set(exchange.Exchange(request_id="the-id"))
    try:
        said = record("the engine failed")
    finally:
        exchange.CURRENT.reset(token)
    assert PlainLines().format(said).endswith("some.place: the engine failed (request the-id)")
    assert json.loads(JsonLines().format(said))["request_id"] == "the-id"
    assert "(request" not in PlainLines().format(record("nobody asked"))


@pytest.fixture(scope="module")
def failing(request: pytest.FixtureRequest) -> Any:
    """A teacher that fails on token 7."""
    with serving(theory(Behaviour(failing_id=7))) as server:
        yield server


def messages(*ids: int) -> list[bytes]:
    call = ScoreRequest((Sequence(np.array(ids, dtype=np.int32)),), ScoreSpec())
    return [m.SerializeToString() for m in codec.encode_score_request(call)]


def trailing_id(server: Server, sent: list[bytes]) -> tuple[str, str]:
    """The ids in a gRPC call's trailing metadata and in its status' details."""
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.stream_stream("/teacher.v1.TeacherService/Score")(iter(sent))
        inside = ""
        try:
            list(call)
        except grpc.RpcError:
            from grpc_status import rpc_status

            inside = codec.decode_error(rpc_status.from_call(call)).request_id
        return str(dict(call.trailing_metadata())["x-request-id"]), inside


def test_every_answer_carries_an_id_that_the_log_has_too(failing: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "teacher_server.calls"):
        ok, _ = trailing_id(failing, messages(1, 2))
        failed, in_details = trailing_id(failing, messages(1, 7))
        invalid, in_invalid = trailing_id(failing, [b"\xff\xff"])
        answer = httpx.post(f"{failing.http}/v1/score", json={"sequences": [[1, 2]]})
        problem = httpx.post(f"{failing.http}/v1/score", json={"sequences": [[1, 7]]})
        nonsense = httpx.post(f"{failing.http}/v1/score", content=b"{")
    assert failed == in_details
    assert invalid == in_invalid
    for response in (problem, nonsense):
        assert response.json()["instance"] == f"urn:uuid:{response.headers['x-request-id']}"
    ids = [ok, failed, answer.headers["x-request-id"], problem.headers["x-request-id"]]
    ids += [nonsense.headers["x-request-id"], invalid]
    assert len(set(ids)) == len(ids)
    for request_id in ids:
        assert ID.fullmatch(request_id)
        (line,) = [r for r in caplog.records if getattr(r, "request_id", "") == request_id and hasattr(r, "fields")]
        assert line.fields["method"] == "score"  # type: ignore[attr-defined]


@pytest.mark.parametrize("transport", ["grpc", "http"])
def test_a_trainers_error_names_the_call_in_the_servers_log(failing: Server, transport: str) -> None:
    with connect(getattr(failing, transport), name="me") as client:
        with pytest.raises(TeacherFailed, match=r"the cause is in the server's log \(request [0-9a-f-]{36}\)") as told:
            client.score([Sequence(np.array([1, 7], dtype=np.int32))])
        with pytest.raises(InvalidRequest) as invalid:
            client.score([Sequence(np.array([1, 90_000], dtype=np.int32))])
    ids = [error.value.request_id for error in (told, invalid)]
    assert {e.request_id for e in failing.app.service.live.errors if e.client == "me"} >= set(ids)


def test_a_server_writes_json_and_nothing_else_where_it_is_told_to(tmp_path: Path) -> None:
    arguments = ("--model", "theory", "--backend", "theoretical", "--log-format", "json")
    with process(tmp_path, *arguments) as (_, addresses):
        given = httpx.post(f"{addresses['http']}/v1/score", json={"sequences": [[1, 2]]}, headers={"x-client": "me"})
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    (call,) = [line for line in lines if line.get("request_id") == given.headers["x-request-id"]]
    assert {name: call[name] for name in ("client", "method", "transport", "outcome", "level")} == {
        "client": "me",
        "method": "score",
        "transport": "http",
        "outcome": "OK",
        "level": "info",
    }
    assert 0 < call["seconds"] < 60
