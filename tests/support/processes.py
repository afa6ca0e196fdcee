"""Runs of the GPT example seen from outside: torchrun's processes, and how far they have saved."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path


def ranks_of(launcher: subprocess.Popen[bytes]) -> Iterator[tuple[int, int]]:
    """(pid, rank) of the processes that a torchrun started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        if int(stat.read_text().rpartition(")")[2].split()[1]) == launcher.pid:
            environment = stat.with_name("environ").read_bytes().split(b"\0")
            yield from ((int(stat.parent.name), int(x[5:])) for x in environment if x.startswith(b"RANK="))


def wait_for_step(saved: Path, step: int, launcher: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not any(int(path.name[5:12]) >= step for path in saved.glob("*.pt")):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
