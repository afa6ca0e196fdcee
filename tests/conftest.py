"""Fixtures shared by all tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from support.pool import Pool

# Time is no property of what is tested: on a machine that does something else, any example may take seconds.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

# As the ranks: on some processors MKL divides a product of a few hundred elements among threads, which changes its last bits,
# and tests compare what this process computes with what ranks have computed.
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Cases of a test that is marked `sampled(every)` are slow tests, but for every so many-th of them."""
    seen: Counter[str] = Counter()
    for item in items:
        mark = item.get_closest_marker("sampled")
        if mark is not None and not item.get_closest_marker("slow"):
            name = item.nodeid.partition("[")[0]
            if seen[name] % mark.args[0]:
                item.add_marker(pytest.mark.slow)
            seen[name] += 1


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Pool of gloo ranks; its processes start with the first call that needs them and serve the whole session."""
    pool = Pool()
    yield pool
    pool.close()
