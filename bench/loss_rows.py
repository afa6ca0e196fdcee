"""Rows of the loss bench, and each beside data-parallel training: gaps, steps needed, messages sent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from loss_methods import DATA_PARALLEL, Case, Method
from loss_training import CHECKS, graph_of

Curve = list[float]

NEAR = 1.0
"""Percent above data-parallel training's final loss that count as near it."""

_BYTES = {None: 4.0, "bf16": 2.0, "int8": 17 / 16}
"""Of an element, with its share of a scale."""


@dataclass(frozen=True)
class Row:
    """A method at its best rate: validation losses at `CHECKS`, seed by seed."""

    case: Case
    method: Method
    rate: float
    start_rate: float | None
    curves: Sequence[Curve]

    @property
    def final(self) -> float:
        """Mean over seeds of the loss at the end."""
        return statistics.mean(curve[-1] for curve in self.curves)


@dataclass(frozen=True)
class Comparison:
    """A row beside data-parallel training of the same case, seed by seed."""

    row: Row
    baseline: Row

    @cached_property
    def gaps(self) -> list[float]:
        """Percent by which the loss at the end is above the baseline's, of each seed that both have."""
        pairs = zip(self.row.curves, self.baseline.curves, strict=False)
        return [100 * (curve[-1] / base[-1] - 1) for curve, base in pairs]

    @property
    def mean(self) -> float:
        return statistics.mean(self.gaps)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return statistics.stdev(self.gaps) / math.sqrt(len(self.gaps)) if len(self.gaps) > 1 else math.nan

    def reached(self, above: float) -> float | None:
        """The part of all steps after which the loss, mean over seeds, is so many percent above the baseline's final one.

        Between checks it is interpolated. None if it is higher at the end.
        """
        pairs = list(zip(self.row.curves, self.baseline.curves, strict=False))
        gaps = [statistics.mean(100 * (c[i] / base[-1] - 1) for c, base in pairs) for i in range(len(CHECKS))]
        for i, gap in enumerate(gaps):
            if gap <= above:
                if i == 0 or not math.isfinite(gaps[i - 1]):
                    return CHECKS[i]
                part = (gaps[i - 1] - above) / (gaps[i - 1] - gap)
                return CHECKS[i - 1] + part * (CHECKS[i] - CHECKS[i - 1])
        return None


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """All rows beside their baselines, case by case."""
    baselines = {row.case: row for row in rows if row.method == DATA_PARALLEL}
    return [Comparison(row, baselines[case]) for case in baselines for row in rows if row.case == case]


def sent(row: Row) -> float:
    """What a rank (or, for machines, a machine) sends in a step of gossip, in copies of the model in fp32."""
    nodes = row.case.ranks // row.method.machine
    if row.method == DATA_PARALLEL or row.method.average_until == 1:
        return 2 * (nodes - 1) / nodes
    neighbours = len(graph_of(row.method, nodes).round(0, 0).send)
    return neighbours * _BYTES[row.method.wire] / 4
