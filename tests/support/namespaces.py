"""Machines of one test, made of Linux network namespaces: each has an address of its own, and the network between them can break.

    with Network([3, 2]) as network:              # five machines, three at one switch, two at another
        network.inside(0, host_a_store)           # in a thread on machine 0
        ...                                       # in a process of machine k: `enter(k, network.name)` before it opens sockets
        network.cut()                             # the cable between the switches
        network.mend()

Needs root and the `ip` command: `why_not()` says what is missing.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

R = TypeVar("R")

_CLONE_NEWNET = 0x40000000


def why_not() -> str:
    """Why there can be no namespaces here; "" if there can."""
    if os.name != "posix" or not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the command ip (iproute2)"
    name = f"fft{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


def address(machine: int) -> str:
    """Of a machine, for the others."""
    return f"10.77.0.{machine + 1}"


def enter(machine: int, network: str) -> None:
    """Have this thread, and those that it starts, be on a machine of the network."""
    with open(f"/run/netns/{network}m{machine}") as namespace:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(namespace.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter machine {machine}")


class Network:
    """Machines at switches that are joined by one cable; see the module.

    Args:
        sides: how many machines there are at each of the two switches.
    """

    def __init__(self, sides: Sequence[int]) -> None:
        self.name, self._sides = f"ff{os.getpid()}", sides

    def __enter__(self) -> Network:
        try:
            self._make()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for name in (*(f"{self.name}m{machine}" for machine in range(sum(self._sides))), f"{self.name}s"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def _make(self) -> None:
        switches = f"{self.name}s"
        _ip(f"netns add {switches}")
        for side in (0, 1):
            _ip(f"-n {switches} link add switch{side} type bridge")
            _ip(f"-n {switches} link set switch{side} up")
        _ip(f"-n {switches} link add cable0 type veth peer name cable1")
        machine = 0
        for side, count in enumerate(self._sides):
            _ip(f"-n {switches} link set cable{side} master switch{side}")
            _ip(f"-n {switches} link set cable{side} up")
            for _ in range(count):
                own = f"{self.name}m{machine}"
                _ip(f"netns add {own}")
                _ip(f"-n {own} link set lo up")
                _ip(f"-n {own} link add eth0 type veth peer name port{machine} netns {switches}")
                _ip(f"-n {own} addr add {address(machine)}/24 dev eth0")
                _ip(f"-n {own} link set eth0 up")
                _ip(f"-n {switches} link set port{machine} master switch{side}")
                _ip(f"-n {switches} link set port{machine} up")
                machine += 1

    def cut(self) -> None:
        """Break the cable: nothing goes from one side to the other, and nobody is told."""
        _ip(f"-n {self.name}s link set cable0 down")

    def mend(self) -> None:
        """Have it be whole again."""
        _ip(f"-n {self.name}s link set cable0 up")

    def inside(self, machine: int, function: Callable[[], R]) -> R:
        """What a function returns on a machine; sockets and threads that it makes stay there."""
        found: list[R] = []

        def run() -> None:
            enter(machine, self.name)
            found.append(function())

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return found[0]


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True, capture_output=True)
