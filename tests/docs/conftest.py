"""What the tests of pages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.docs.desk import Desk


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """One desk for all pages; at its end every server that examples started has ended well."""
    made = Desk(tmp_path_factory.mktemp("examples"))
    yield made
    codes = made.close()
    assert codes == [0] * len(codes)
