"""Servers for the tests of HTTP."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.servers import Server, serving, theory


@pytest.fixture(scope="package")
def server() -> Iterator[Server]:
    """A theoretical teacher that accepts bodies of up to 1 MiB."""
    with serving(theory(), max_request_mib=1, name="theory") as running:
        yield running


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    """A client of it."""
    with httpx.Client(base_url=server.http, timeout=60) as client:
        yield client
