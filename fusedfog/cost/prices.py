"""What a way to train costs: the time of a step, bytes, and loss; and which of several is the best.

Above `timeline` and `loss`, which know the first two and the last. `topology="auto"` and `fusedfog plan` both choose by `best`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from fusedfog.algorithms import TABLE
from fusedfog.cost.loss import Measured, Way, expected
from fusedfog.cost.network import Collective, Network
from fusedfog.cost.timeline import Prediction, Scheme, predict
from fusedfog.cost.workload import Workload

CLOSE = 0.002
"""Steps, and times, that differ by less than this part are equal."""


SPREAD = 0.5
"""Percent of loss by which measured runs of one method differ from seed to seed: less says nothing."""


@dataclass(frozen=True)
class Price:
    """What a way costs.

    Attributes:
        prediction: of time and bytes per step.
        loss: the row of the table of losses to go by; None where nothing like it was measured.
        own: the row is of this very way, and not of one that stands for it (`loss.expected`).
        time: until DistributedDataParallel's loss (`loss.NEAR` percent above its final one), over the time that the fastest of
            its collectives takes itself; None where it is not known, or never comes.
    """

    prediction: Prediction
    loss: Measured | None
    own: bool
    time: float | None

    @property
    def seconds(self) -> float:
        """Seconds of a step."""
        return self.prediction.step_s

    @property
    def above(self) -> float | None:
        """Percent of the final loss above data-parallel training's, as far as it is known."""
        if self.loss is not None:
            return self.loss.above
        return 0.0 if self.time is not None else None

    def shown_loss(self) -> str:
        """Such as "+0.5% n=16", measured on 16 ranks, or "~+0.5% n=16" of a way that stands for this one; "-" if unknown."""
        if self.loss is None:
            return "-" if self.above is None else "0"
        return f"{'' if self.own else '~'}{self.loss.above:+.1f}% n={self.loss.ranks}"

    def shown_time(self) -> str:
        """`time`, "never", or "-" if unknown."""
        return f"{self.time:.2f}" if self.time is not None else "never" if self.loss is not None else "-"


def price(prediction: Prediction, way: Way | None, data_parallel_s: float | None) -> Price:
    """The price of something with this prediction.

    Args:
        way: what its loss depends on; None where nothing is known of that.
        data_parallel_s: a step of DistributedDataParallel in seconds; None leaves `time` out.
    """
    loss, own = (expected(way, prediction.ranks) if way is not None else None) or (None, True)
    steps = loss.steps if loss is not None else None
    if steps is None or data_parallel_s is None:
        return Price(prediction, loss, own, None)
    return Price(prediction, loss, own, prediction.step_s * steps / data_parallel_s)


def of_data_parallel(prediction: Prediction, data_parallel_s: float) -> Price:
    """The price of data-parallel training, whose loss the others' are compared with."""
    return Price(prediction, None, True, prediction.step_s / data_parallel_s)


def data_parallel_seconds(workload: Workload, network: Network) -> float:
    """A step of DistributedDataParallel in seconds, by the fastest of its collectives."""
    row = TABLE["SGD"]["allreduce"]
    schemes = [Scheme(row, None, collective, ddp=True) for collective in get_args(Collective)]
    return min(predict(workload, network, scheme, "DDP").step_s for scheme in schemes)


def fastest(found: Sequence[Price]) -> Price:
    """The one with the shortest step; of equally fast ones, the first whose loss is `SPREAD` above the smallest or less."""
    limit = min(one.seconds for one in found) * (1 + CLOSE)
    quick = [one for one in found if one.seconds <= limit]
    least = min((one.above for one in quick if one.above is not None), default=None)
    if least is None:
        return quick[0]
    return next(one for one in quick if one.above is not None and one.above <= least + SPREAD)


def best(found: Sequence[Price]) -> Price:
    """The one with the least time to DistributedDataParallel's loss, of those that are known to get there; else the fastest.

    Of equal ones the first. So a way that nobody has measured is taken only where none is known to get there.
    """
    times = [one.time for one in found if one.time is not None]
    if not times:
        return fastest(found)
    limit = min(times) * (1 + CLOSE)
    return next(one for one in found if one.time is not None and one.time <= limit)
