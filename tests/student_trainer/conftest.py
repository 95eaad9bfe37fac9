"""Real teachers of the tiny pair, each as its own process, for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.servers import ROOT, process

TEACHER, STUDENT = ROOT / "tiny_pair" / "teacher", ROOT / "tiny_pair" / "student_base"


def _serve(tmp_path_factory: pytest.TempPathFactory, model: str) -> Iterator[dict[str, Any]]:
    with process(tmp_path_factory.mktemp("teacher"), "--model", model, "--dtype", "float32") as (_, addresses):
        yield addresses


@pytest.fixture(scope="session")
def pair_teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """{"grpc": ..., "http": ...} of a server with the tiny teacher."""
    yield from _serve(tmp_path_factory, str(TEACHER))


@pytest.fixture(scope="session")
def student_as_teacher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The same for a server whose teacher is the tiny student itself."""
    yield from _serve(tmp_path_factory, str(STUDENT))
