"""The oldest Triton that fusedfog promises compiles every rule; `make test-triton` tries all versions."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from support import triton_versions

pytest.importorskip("triton")

SELECTION = "stay_in_registers"
"""Every rule, dtype, number of neighbours and format of messages."""

ROOT = Path(__file__).resolve().parents[2]


def test_the_oldest_triton_compiles_every_rule():
    oldest = triton_versions.VERSIONS[0]
    try:
        found = triton_versions.run(oldest, *triton_versions.TESTS[:2], "-v", "-k", SELECTION, "-m", "not slow")
    except triton_versions.Unavailable as problem:
        pytest.skip(f"NOT TESTED with triton {oldest}: {problem}")
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    assert triton_versions.counts(found.stdout)["passed"] >= 60


def test_the_oldest_triton_is_the_one_that_the_package_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (minimum,) = (re.match(r"triton>=([\d.]+)", need) for need in project["dependencies"] if need.startswith("triton"))
    assert minimum is not None
    assert triton_versions.VERSIONS[0].startswith(minimum[1])
