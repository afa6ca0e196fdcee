"""Commands that start other processes, seen from outside: torchrun's ranks, how far they have saved, where they hang."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def run_all(
    command: Sequence[str], timeout: float, cwd: Path, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with the output as text; after the timeout every process of the command says where it stands, and ends."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env={**env, "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            out, told = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            for pid in [*_started_by(process.pid)][::-1]:  # Those last that would end the others.
                os.kill(pid, signal.SIGABRT)
            out, told = process.communicate()
            raise AssertionError(f"{command} had not ended after {timeout:g} s:\n{out}\n{told}") from None
    return subprocess.CompletedProcess(command, process.returncode, out, told)


def _started_by(pid: int) -> Iterator[int]:
    """A process and all that it has started; torchrun gives its ranks sessions of their own."""
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            yield from _started_by(child)


def ranks_of(launcher: subprocess.Popen[bytes]) -> Iterator[tuple[int, int]]:
    """(pid, rank) of the processes that a torchrun started."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) != launcher.pid:
                continue
            environment = stat.with_name("environ").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):  # Others of this machine's processes end meanwhile.
            continue
        yield from ((int(stat.parent.name), int(x[5:])) for x in environment if x.startswith(b"RANK="))


def wait_for_step(saved: Path, step: int, launcher: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not any(int(path.name[5:12]) >= step for path in saved.glob("*.pt")):
        assert launcher.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
