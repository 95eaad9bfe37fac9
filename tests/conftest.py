"""What all tests share: examples that hypothesis finds are the same in every run, and take the time they take; and
`--minutes N`, after which a run begins no further test and says which ones it left out, so that CI ends in time.
"""

from __future__ import annotations

import time

import pytest
from hypothesis import settings

settings.register_profile("project", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("project")

BEGAN = time.monotonic()
LONG = ("student_trainer/test_stages", "faults/test_training", "docs/", "student_trainer/test_", "clients/")
"""Where a single file takes long: these begin first, so that no process is left alone with one of them at the end."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """See the module."""
    parser.addoption("--minutes", type=float, default=None, help="begin no test after so many minutes")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips a test for which no time is left, before its fixtures are made."""
    minutes = item.config.getoption("--minutes")
    if minutes is not None and time.monotonic() - BEGAN > 60 * minutes:
        pytest.skip(f"no time left: --minutes {minutes:g}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Orders files by LONG and leaves the rest as it is."""

    def place(item: pytest.Item) -> int:
        inside = item.nodeid.removeprefix("tests/")
        return next((at for at, start in enumerate(LONG) if inside.startswith(start)), len(LONG))

    items.sort(key=place)
