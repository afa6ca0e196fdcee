"""Hosts on one Linux machine: network namespaces joined by a switch, with shaped links. Needs root and iproute2.

    core bridge ==shaped== machine 0's bridge ---- host 0, host 1, ...
                ==shaped== machine 1's bridge ---- ...

Every machine has one link to the core, shaped in both directions; the hosts inside a machine are joined by an unshaped
bridge. A machine of one host has no bridge of its own: its host hangs on the shaped link.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from typing import Self

INTERFACE = "eth0"
_PREFIX = "fogbench"
_MTU, _ETHERNET = 1500, 14
_HEADERS = 20 + 32
"""Bytes of IP header and of TCP header with timestamps."""

# What an idle link passes at once. tbf cuts offloaded TCP segments (64 kB and 45 headers) into packets unless they fit in:
# with 68,000 bytes eight hosts at 27 MB/s keep two cores busy, with 80,000 one eighth of that.
_BURST = 80_000
# A queue longer than any step's messages: where a real switch would drop, TCP's losses would be what is measured.
QUEUE = 64 << 20


def obstacle() -> str | None:
    """Why hosts cannot be made here, or None if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"iproute2 is not installed (no {' and no '.join(missing)})"
    try:
        with Network(machines=2, local=1) as network:
            network.shape(1e6)
    except subprocess.CalledProcessError as error:
        return f"not allowed here: `{' '.join(error.cmd)}` says {error.stderr.strip()}"
    return None


def remove_leftovers() -> None:
    """Remove namespaces of runs that were killed before they could."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    for name, pid in re.findall(rf"^({_PREFIX}-(\d+)-\S+)", listed, re.MULTILINE):
        if not os.path.exists(f"/proc/{pid}"):
            _run("ip", "netns", "del", name)


class Network:
    """`machines` x `local` hosts, numbered machine by machine; a context manager that leaves no trace."""

    def __init__(self, machines: int, local: int) -> None:
        self.machines, self.local = machines, local
        self.size = machines * local
        self._prefix = f"{_PREFIX}-{os.getpid()}"
        self._switch = f"{self._prefix}-switch"
        self._made: list[str] = []
        self._shaped: list[tuple[str, str]] = []

    def __enter__(self) -> Self:
        remove_leftovers()
        try:
            self._build()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def address(self, host: int) -> str:
        """A host's IPv4 address."""
        return f"10.77.0.{host + 1}"

    def inside(self, host: int, command: list[str]) -> list[str]:
        """The command line that runs `command` on a host."""
        return ["ip", "netns", "exec", self._host(host), *command]

    def shape(self, rate: float, queue: int = QUEUE) -> None:
        """Let every machine's link carry `rate` bytes a second of TCP payload each way, and hold so many more that wait."""
        limits = ["rate", _bits(rate), "burst", str(_BURST), "limit", str(queue)]
        for namespace, device in self._shaped:
            _run("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", "tbf", *limits)

    def slow_edge(self, sender: int, receiver: int, rate: float, slow: float) -> None:
        """Let what one host sends to one other travel at `slow` bytes a second, and all else that it sends at `rate`.

        Until `shape` is called. Of hosts with a shaped link each.
        """
        assert self.local == 1
        inside = (self._host(sender), INTERFACE)
        _tc(*inside, "qdisc", "replace", "root", "handle", "1:", "htb", "default", "1")
        for number, one in ((1, rate), (2, slow)):
            classid = ("classid", f"1:{number}")
            _tc(*inside, "class", "replace", "parent", "1:", *classid, "htb", "rate", _bits(one), "burst", str(_BURST))
            _tc(*inside, "qdisc", "replace", "parent", f"1:{number}", "bfifo", "limit", str(QUEUE))
        matches = ("u32", "match", "ip", "dst", f"{self.address(receiver)}/32", "flowid", "1:2")
        _tc(*inside, "filter", "replace", "parent", "1:", "protocol", "ip", "prio", "1", *matches)

    def _host(self, host: int) -> str:
        return f"{self._prefix}-host{host}"

    def _build(self) -> None:
        self._add_namespace(self._switch)
        self._add_bridge("core")
        for machine in range(self.machines):
            hosts = range(machine * self.local, (machine + 1) * self.local)
            if self.local == 1:
                self._add_host(machine, "core")
                self._shaped += [(self._switch, f"port{machine}"), (self._host(machine), INTERFACE)]
                continue
            self._add_bridge(f"machine{machine}")
            self._add_link((self._switch, f"up{machine}"), (self._switch, f"down{machine}"))
            self._attach(f"up{machine}", f"machine{machine}")
            self._attach(f"down{machine}", "core")
            self._shaped += [(self._switch, f"up{machine}"), (self._switch, f"down{machine}")]
            for host in hosts:
                self._add_host(host, f"machine{machine}")

    def _add_namespace(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._made.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def _add_bridge(self, name: str) -> None:
        _run("ip", "-n", self._switch, "link", "add", name, "type", "bridge")
        _run("ip", "-n", self._switch, "link", "set", name, "up")

    def _add_link(self, one: tuple[str, str], other: tuple[str, str]) -> None:
        peer = ["peer", "name", other[1], "netns", other[0]]
        _run("ip", "-n", one[0], "link", "add", one[1], "type", "veth", *peer)

    def _attach(self, port: str, bridge: str) -> None:
        _run("ip", "-n", self._switch, "link", "set", port, "master", bridge, "up")

    def _add_host(self, host: int, bridge: str) -> None:
        name = self._host(host)
        self._add_namespace(name)
        self._add_link((self._switch, f"port{host}"), (name, INTERFACE))
        self._attach(f"port{host}", bridge)
        _run("ip", "-n", name, "addr", "add", f"{self.address(host)}/24", "dev", INTERFACE)
        _run("ip", "-n", name, "link", "set", INTERFACE, "up")
        # BBR, some kernels' default, halts a connection for 200 ms every ten seconds to measure its latency.
        _run(*self.inside(host, ["sh", "-c", "echo reno > /proc/sys/net/ipv4/tcp_congestion_control"]))

    def _remove(self) -> None:
        for name in self._made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
        self._made.clear()


def _bits(rate: float) -> str:
    """What tc is told for `rate` bytes a second of TCP payload."""
    return f"{round(8 * rate * (_MTU + _ETHERNET) / (_MTU - _HEADERS))}bit"


def _tc(namespace: str, device: str, kind: str, verb: str, *options: str) -> None:
    _run("tc", "-n", namespace, kind, verb, "dev", device, *options)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
