"""The file of measured links: `fusedfog calibrate` writes it, `fusedfog plan --links` and `links=` of the optimizers read it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from fusedfog.cost.network import Link, Network

INSIDE = Link(latency_s=5e-6, bandwidth=100e9)
"""What is assumed of links inside a machine if nothing is given: several GPUs joined by NVLink."""

ACROSS = Link(latency_s=30e-6, bandwidth=25e9 / 8)
"""And of a machine's network card, where only the order of ways counts: Ethernet of 25 Gb/s."""


@dataclass(frozen=True)
class Links:
    """What was measured on some machines.

    Attributes:
        local: ranks per machine.
        inside, across: links between ranks of one machine, and between machines; None where there was none to measure.
        memory_bandwidth: bytes per second of a copy, reads and writes together.
        step_s: seconds that a step of one rank alone takes, optimizer included; None if nobody has said.

    Raises:
        ValueError: `step_s` is not positive.
    """

    local: int
    inside: Link | None
    across: Link | None
    memory_bandwidth: float
    step_s: float | None = None

    def __post_init__(self) -> None:
        if self.step_s is not None and not 0 < self.step_s < math.inf:
            raise ValueError(f"a step takes a positive number of seconds, got {self.step_s!r}")

    def write(self, path: str | PathLike[str], **more: Any) -> None:
        """Write the file; `more` goes beside the links, for people."""
        Path(path).write_text(json.dumps({**asdict(self), **more}, indent=1) + "\n")


def read_links(path: str | PathLike[str]) -> Links:
    """The links in a file.

    Raises:
        ValueError: the file holds something else.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(Path(path).read_text())
        local, memory = int(found["local"]), float(found["memory_bandwidth"])
        step = found.get("step_s")
        links = Links(
            local, _link(found["inside"]), _link(found["across"]), memory, None if step is None else float(step)
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file that `fusedfog calibrate` writes: {error!r}") from None
    if links.inside is None and links.across is None:
        raise ValueError(f"{path} holds no link")
    return links


def links_of(given: Links | Network | str | PathLike[str]) -> Links:
    """Links that a user gives: measured ones, a network's, or a file's.

    Raises:
        ValueError: as `read_links`.
        OSError: the file cannot be read.
        TypeError: it is none of these.
    """
    if isinstance(given, Network):
        return Links(given.local, given.inside, given.across, math.inf)
    if isinstance(given, str | PathLike):
        return read_links(given)
    if not isinstance(given, Links):
        raise TypeError(
            f"links is the path of a file that `fusedfog calibrate` writes, a fusedfog.plan.Links or Network, or None, got "
            f"{type(given).__name__}"
        )
    return given


def network_of(links: Links | None, ranks: int, local: int) -> Network:
    """The network of `ranks` on machines of `local`, with these links, and where there are none with assumed ones."""
    inside = links.inside if links is not None and links.inside is not None else INSIDE
    across = links.across if links is not None and links.across is not None else ACROSS
    return Network(ranks, across, local, inside if local > 1 else None)


def _link(entry: Mapping[str, float] | None) -> Link | None:
    return None if entry is None else Link(float(entry["latency_s"]), float(entry["bandwidth"]))
