"""What a section of bench/gpu.py writes down, kept on disk after every line, and the report made of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import table


class Notes:
    """A section's findings: a JSON file that is complete after every change, so that a crash or a timeout loses nothing."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.found: dict[str, Any] = {}

    def __setitem__(self, key: str, value: Any) -> None:
        self.found[key] = value
        self._write()

    def add(self, key: str, entry: Any) -> None:
        """Append to the list `key`."""
        self.found.setdefault(key, []).append(entry)
        self._write()

    def _write(self) -> None:
        fresh = self._path.with_suffix(".fresh")
        fresh.write_text(json.dumps(self.found))
        fresh.replace(self._path)


@dataclass(frozen=True)
class Run:
    """How a section is to run.

    Attributes:
        dry: tiny sizes, without a GPU (`gpu_dry`): only to see that the section works.
        deadline: seconds of `time.time()` after which nothing new is begun.
        shard, shards: which part of the work this process does.
        work: a folder for files between processes.
    """

    dry: bool
    deadline: float
    shard: int
    shards: int
    work: Path

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry else "cuda")

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()


def merge(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The findings of a section's shards as one: counts add up, of other numbers the largest stays, lists are joined."""
    whole: dict[str, Any] = {}
    for part in parts:
        for key, value in part.items():
            if key not in whole:
                whole[key] = list(value) if isinstance(value, list) else value
            elif isinstance(value, list) or (isinstance(value, int) and not isinstance(value, bool)):
                whole[key] = whole[key] + value
            elif isinstance(value, float):
                whole[key] = max(whole[key], value)
    return whole


def markdown(report: Mapping[str, Any]) -> str:
    """The whole report as text."""
    lines = [
        "# Measured on a GPU: `python bench/gpu.py`",
        "",
        ", ".join(f"{k} {v}" for k, v in report["machine"].items()),
    ]
    for name, section in report["sections"].items():
        lines += ["", f"## {name}: {section['status']}, {section['seconds']:.0f} s", "", section["about"]]
        for key, value in section["found"].items():
            lines += ["", *_lines(key, value)]
        if section.get("log"):
            lines += ["", "```", section["log"].strip(), "```"]
    return "\n".join(lines) + "\n"


def _lines(key: str, value: Any) -> list[str]:
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        names = list(dict.fromkeys(name for entry in value for name in entry))
        return [f"{key}:", "", table([{name: entry.get(name) for name in names} for entry in value])]
    if isinstance(value, list):
        return [f"{key}:", *(f"- {entry}" for entry in value)]
    if isinstance(value, dict):
        return [f"{key}:", *(f"- {name}: {entry}" for name, entry in value.items())]
    return (
        [f"{key}:", "", "```", value.strip(), "```"]
        if isinstance(value, str) and "\n" in value
        else [f"{key}: {value}"]
    )


def verdict(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """One line: what passed, and what did not and why."""
    good = [name for name, section in sections.items() if section["status"] == "ok"]
    bad = [f"{name} ({section['status']})" for name, section in sections.items() if section["status"] != "ok"]
    words = [f"PASSED {len(good)} of {len(sections)}: {', '.join(good) or 'none'}"]
    return "; ".join([*words, f"NOT PASSED: {', '.join(bad)}"] if bad else words)
