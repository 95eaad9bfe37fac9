"""One student and one engine of each kind for all tests of this folder; vLLM takes half a minute to start."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from student_trainer.rollouts import RolloutEngine
from tests.student_trainer.rollouts.engines import ENGINES, closed, make_student, open_one


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The student; a test that changes its weights puts them back."""
    return make_student(tmp_path_factory.mktemp("rollouts") / "student")


VLLM = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
"""vLLM runs in the tests' own process and warns of what it imports."""


@pytest.fixture(scope="session", params=[pytest.param(e, marks=VLLM if e == "vllm" else ()) for e in ENGINES])
def engine(request: pytest.FixtureRequest, student: Any) -> Iterator[RolloutEngine]:
    """An engine over the student."""
    engine = open_one(request.param, student)
    yield engine
    closed(engine)
