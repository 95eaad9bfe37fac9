"""A teacher with a real model for clients that other people wrote: the command that the pages show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.servers import process

NAME = "teacher"


@dataclass(frozen=True)
class Teacher:
    """Where it answers."""

    http: str
    grpc: str


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Teacher]:
    """`python -m teacher_server --model tiny_pair/teacher`, for all tests of a session."""
    with process(tmp_path_factory.mktemp("teacher"), "--model", "tiny_pair/teacher", "--name", NAME) as (_, found):
        yield Teacher(found["http"], found["grpc"])
