"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from support.pool import Pool

# Time is no property of what is tested: on a machine that does something else, any example may take seconds.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Pool of gloo ranks; its processes start with the first call that needs them and serve the whole session."""
    pool = Pool()
    yield pool
    pool.close()
