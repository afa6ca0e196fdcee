"""How the CPU pass cuts a region's parameters into batches of pieces that stay in the caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .region import ALIGNMENT


@dataclass(frozen=True)
class Cut:
    """How some parameters of a flat tensor are cut into pieces, and those into batches.

    Attributes:
        start, stop: the part of the tensor that holds them.
        sizes: lengths of all pieces and of what lies between them, in order of memory.
        pieces: for each piece its place in `sizes`, its parameter's position in the region and its offset in there.
        batches: ranges of pieces.
        runs: for each batch, the parts of the flat tensor that its pieces cover, with no more than padding in between.
    """

    start: int
    stop: int
    sizes: tuple[int, ...]
    pieces: tuple[tuple[int, int, int], ...]
    batches: tuple[range, ...]
    runs: tuple[tuple[slice, ...], ...]

    def views(self, flat: Tensor) -> list[Tensor]:
        """The pieces of a flat tensor."""
        if len(self.sizes) == 1:  # A split costs as much again, and a segment of one parameter little else.
            return [flat[self.start : self.stop]]
        parts = flat[self.start : self.stop].split(self.sizes)
        return [parts[place] for place, _, _ in self.pieces]


def cut(spans: Sequence[tuple[int, int]], positions: Sequence[int], width: int) -> Cut:
    """Cut the parameters at `positions` of `spans`, (start, numel) each, into pieces of at most `width` elements."""
    sizes: list[int] = []
    pieces: list[tuple[int, int, int]] = []
    batches: list[range] = []
    runs: list[list[slice]] = [[]]
    first = filled = 0
    begin = end = spans[positions[0]][0] if positions else 0
    for position in positions:
        start, numel = spans[position]
        if start > end:
            sizes.append(start - end)
        for offset in range(0, numel, width):
            size = min(width, numel - offset)
            if filled and filled + size > width:
                batches.append(range(first, len(pieces)))
                first, filled = len(pieces), 0
                runs.append([])
            _extend(runs[-1], start + offset, size)
            pieces.append((len(sizes), position, offset))
            sizes.append(size)
            filled += size
        end = start + numel
    batches.append(range(first, len(pieces)))
    return Cut(begin, end, tuple(sizes), tuple(pieces), tuple(batches), tuple(map(tuple, runs)))


def _extend(runs: list[slice], start: int, size: int) -> None:
    """Add a piece to the runs of its batch."""
    stop = start + size
    if runs and start - runs[-1].stop < ALIGNMENT:
        start = runs.pop().start
    runs.append(slice(start, stop))
