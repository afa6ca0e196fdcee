"""The file of measured links: `fusedfog calibrate` writes it, `fusedfog plan --links` reads it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from fusedfog.cost.network import Link


@dataclass(frozen=True)
class Links:
    """What was measured on some machines.

    Attributes:
        local: ranks per machine.
        inside, across: links between ranks of one machine, and between machines; None where there was none to measure.
        memory_bandwidth: bytes per second of a copy, reads and writes together.
    """

    local: int
    inside: Link | None
    across: Link | None
    memory_bandwidth: float

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
        links = Links(local, _link(found["inside"]), _link(found["across"]), memory)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not a file that `fusedfog calibrate` writes: {error!r}") from None
    if links.inside is None and links.across is None:
        raise ValueError(f"{path} holds no link")
    return links


def _link(entry: Mapping[str, float] | None) -> Link | None:
    return None if entry is None else Link(float(entry["latency_s"]), float(entry["bandwidth"]))
