"""Names of parameters for the names of tests."""

from __future__ import annotations

import re


def named(value: object) -> str:
    """`str`, without the addresses of functions: a test is called the same in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
