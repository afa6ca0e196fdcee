"""Which ranks share a machine, and so its link to the others: by the names that processes give their machines."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def this_machine() -> str:
    """The machine that this process runs on: its host name, and on Linux the identity of its kernel's start.

    Machines of one name are told apart by the second part, and containers of one kernel by the first, since each has a
    network interface of its own.
    """
    boot = ""
    with suppress(OSError):
        boot = _BOOT.read_text().strip()
    return f"{socket.gethostname()} {boot}".strip()


def by_machine(names: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The ranks of each machine, by the name of every rank's machine; machines in the order of their first ranks."""
    return tuple(tuple(rank for rank, name in enumerate(names) if name == machine) for machine in dict.fromkeys(names))
