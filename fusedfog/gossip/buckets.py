"""Buckets on their way through steps: a `Lane` is one bucket, a `Sweep` the buckets of a segment that one pass covers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fusedfog.comm.transfer import Transfer
from fusedfog.kernels import Region, Wire
from fusedfog.params.flat import FlatSegment
from fusedfog.params.layout import Bucket, backward_order


@dataclass(frozen=True)
class Inbox:
    """What a pass mixes: for each message its K neighbours' tensors, their weights, and the weight of what was sent.

    Compressed messages are codes, with `scales`, and belong to `wires`, this rank's own ends. With `numbers`, what counts is
    what they hold when the pass is made; see `kernels.Pass`.
    """

    tensors: tuple[tuple[Tensor, ...], ...] = ()
    weights: tuple[float, ...] = ()
    row_sum: float = 1.0
    scales: tuple[tuple[Tensor | None, ...], ...] = ()
    wires: tuple[Wire, ...] = ()
    numbers: Tensor | None = None


EMPTY = Inbox()


@dataclass(eq=False)
class Lane:
    """One bucket: its place in the order of buckets, and its message in flight.

    Attributes:
        inbox, sources: where what the message brings will be, and from whom it comes.
        versions: the sum of the bucket's version counters that there would be without edits since it was sent.
        counted: `versions` is up to date: it was read in this step, in which only passes have written.
        ready: how many of its gradients have come in this step, under fused_backward.
    """

    number: int
    segment: FlatSegment
    bucket: Bucket
    message: Transfer | None = None
    inbox: Inbox = EMPTY
    sources: Iterable[object] = ()
    versions: int = 0
    counted: bool = False
    ready: int = 0

    @property
    def whole(self) -> slice:
        """The bucket's elements in its segment's flat tensors."""
        return slice(self.bucket.start, self.bucket.stop)

    def edits(self) -> int:
        """In-place edits of the bucket's parameters since it was sent."""
        return self.segment.versions(self.bucket) - self.versions

    def count_edits(self) -> int:
        """The same, forgetting them."""
        edits = self.edits()
        self.versions, self.counted = self.versions + edits, True
        return edits


@dataclass(frozen=True)
class Sweep:
    """Buckets of one segment that one pass covers, with the range of their parameters."""

    segment: FlatSegment
    lanes: tuple[Lane, ...]
    region: Region
    first: int
    last: int

    @property
    def whole(self) -> slice:
        """The sweep's elements in its segment's flat tensors."""
        return slice(min(lane.bucket.start for lane in self.lanes), max(lane.bucket.stop for lane in self.lanes))

    def bump_versions(self) -> None:
        """Tell autograd that the parameters were written, which is no edit."""
        self.segment.bump_versions(self.first, self.last)
        for lane in self.lanes:
            lane.versions += lane.bucket.last - lane.bucket.first

    @property
    def numbers(self) -> Iterator[int]:
        """The buckets' places in the order of buckets."""
        return (lane.number for lane in self.lanes)


def lanes_of(segments: Sequence[FlatSegment]) -> tuple[list[Lane], list[Sweep], list[Sweep]]:
    """All buckets in backward order, the sweeps over each of them, and the sweeps over whole segments."""
    lanes, singles = [], []
    members: dict[int, list[Lane]] = {}
    for number, (s, b) in enumerate(backward_order([segment.layout for segment in segments])):
        segment, bucket = segments[s], segments[s].layout.buckets[b]
        lanes.append(Lane(number, segment, bucket))
        singles.append(Sweep(segment, (lanes[-1],), segment.regions[b], bucket.first, bucket.last))
        members.setdefault(s, []).append(lanes[-1])
    wholes = [
        Sweep(segments[s], tuple(own), segments[s].whole, 0, len(segments[s].params)) for s, own in members.items()
    ]
    return lanes, singles, wholes
