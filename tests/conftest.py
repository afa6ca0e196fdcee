"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.pool import Pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Pool of gloo ranks; its processes start with the first call that needs them and serve the whole session."""
    pool = Pool()
    yield pool
    pool.close()
