"""Real text that every machine has: the sources of Python's standard library, as bytes."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VALIDATION_FRACTION = 0.05
# Tests are not installed everywhere, packages differ from machine to machine.
LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class Text:
    """What one rank reads, uint8 [N] each: its own piece of the training files, and all validation files."""

    train: Tensor
    validation: Tensor


def standard_library() -> Path:
    """Where this Python keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def place_in_order(name: str) -> float:
    """A number in 0..1 that depends on the file's name alone: files are sorted by it, and the first ones validate."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def split(root: Path) -> tuple[list[str], list[str]]:
    """Names relative to `root`, with slashes, of the training and validation files: about one in twenty validates.

    Raises:
        FileNotFoundError: there are no Python files, or too few for both sets.
    """
    found = (path.relative_to(root) for path in root.rglob("*.py"))
    names = sorted((path.as_posix() for path in found if LEFT_OUT.isdisjoint(path.parts)), key=place_in_order)
    validation = [name for name in names if place_in_order(name) < VALIDATION_FRACTION]
    train = names[len(validation) :]
    if not train or not validation:
        raise FileNotFoundError(
            f"{len(names)} Python files under {root} are too few to train and validate on; "
            f"give --text a folder with more of them"
        )
    return train, validation


def read(root: Path, names: list[str]) -> Tensor:
    """The files' bytes, uint8 [N], with a zero byte after each file."""
    content = b"".join((root / name).read_bytes() + b"\0" for name in names)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def load(root: Path, rank: int, size: int) -> Text:
    """The text of one of `size` ranks."""
    train, validation = split(root)
    # Dealt out in the order of their names' hashes, so that no rank gets all of encodings/.
    return Text(read(root, train).tensor_split(size)[rank].clone(), read(root, validation))


def cut(text: Tensor, starts: Tensor, length: int) -> Tensor:
    """Windows [len(starts), length] of the text, int64."""
    return text[starts[:, None] + torch.arange(length)].long()


def evenly_spaced(text: Tensor, count: int, length: int) -> Tensor:
    """`count` windows [count, length] at equal distances; the same ones every time."""
    return cut(text, torch.linspace(0, len(text) - length, count, dtype=torch.float64).long(), length)


class RandomWindows:
    """Endless random windows of a text. The generator's state is the position in the data, to save and resume."""

    def __init__(self, text: Tensor, length: int, seed: int) -> None:
        self._text, self._length = text, length
        self._source = torch.Generator().manual_seed(seed)

    def draw(self, count: int) -> Tensor:
        """The next `count` windows [count, length], int64."""
        starts = torch.randint(len(self._text) - self._length + 1, (count,), generator=self._source)
        return cut(self._text, starts, self._length)

    def state_dict(self) -> dict[str, Any]:
        """The position in the data."""
        return {"source": self._source.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved position."""
        self._source.set_state(state["source"])
