"""A trainer's key: from a file to the teacher, and into no setting that is kept."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import pytest

from protos.errors import Unauthenticated
from student_trainer.config import Config
from student_trainer.errors import UserError
from student_trainer.opening import _connect, places
from student_trainer.settings import to_yaml
from student_trainer.teacher_client import TeacherClient
from student_trainer.teacher_client.credentials import Credentials, Key
from student_trainer.teacher_client.tracing import NO_TRACER
from teacher_server.keys import make_key, write
from tests.servers import Server, serving, theory


def config(server: Server, file: Path, **more: str) -> Config:
    """A run with the teacher of `server` and a key in `file`."""
    return Config.model_validate({"teacher": {"endpoint": server.grpc, "api_key_file": str(file), **more}})


def open_one(run: Config, own: bool = False) -> TeacherClient:
    """The client of the run's teacher; `own` as if the run had started it."""
    (place,) = places(run, "all", {None})
    assert place.endpoint is not None
    return _connect(
        run, dataclasses.replace(place, endpoint=None) if own else place, place.endpoint, "", print, NO_TRACER, None
    )


def test_the_key_goes_from_its_file_to_the_teacher_and_into_no_setting(tmp_path: Path) -> None:
    keys, mine = tmp_path / "keys.json", tmp_path / "key"
    key, stored = make_key("trainer-1")
    write(keys, [stored])
    mine.write_text(key)
    with serving(theory(), key=key, keys_file=str(keys)) as server:
        run = config(server, mine)
        with closing(open_one(run)) as client:
            assert client.teacher().name == "theory"
        assert key not in to_yaml(run)
        assert key not in repr(Key(Credentials(str(mine))))
        mine.write_text(make_key("stranger")[0])
        with pytest.raises(Unauthenticated, match="does not know the key"):
            open_one(run)
        with pytest.raises(Unauthenticated, match="wants a key"):  # a teacher of its own gets none
            open_one(run, own=True)


@pytest.mark.parametrize(
    ("more", "words"),
    [({}, "cannot read api_key_file"), ({"ca_file": "ca.pem"}, "ca_file needs TLS, and .* is without; use grpcs://")],
)
def test_files_that_cannot_be_used_are_one_line_for_the_user(tmp_path: Path, more: dict[str, str], words: str) -> None:
    with serving(theory()) as server, pytest.raises(UserError, match=words):
        open_one(config(server, tmp_path / "nothing", **more))
