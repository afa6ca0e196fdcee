"""Buckets on their way through steps: a `BucketState` is one bucket, a `PassGroup` those of a segment that one pass covers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from fusedfog.comm.transfer import Transfer
from fusedfog.kernels import CompressedChannel, Region
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
    channels: tuple[CompressedChannel, ...] = ()
    numbers: Tensor | None = None


EMPTY = Inbox()


@dataclass(eq=False)
class BucketState:
    """One bucket: its place in the order of buckets, and its message in flight.

    Attributes:
        inbox, sources: where what the message brings will be, and from whom it comes.
        versions: the sum of the bucket's version counters that there would be without edits since it was sent.
        counted: `versions` is up to date: it was read in this step, in which only passes have written.
        ready: how many of its gradients have come in this step, under fused_backward.
    """

    number: int
    segment: FlatSegment
    layout: Bucket
    transfer: Transfer | None = None
    inbox: Inbox = EMPTY
    sources: Iterable[object] = ()
    versions: int = 0
    counted: bool = False
    ready: int = 0

    @property
    def whole(self) -> slice:
        """The bucket's elements in its segment's flat tensors."""
        return slice(self.layout.start, self.layout.stop)

    def edits(self) -> int:
        """In-place edits of the bucket's parameters since it was sent."""
        return self.segment.versions(self.layout) - self.versions

    def count_edits(self) -> int:
        """The same, forgetting them."""
        edits = self.edits()
        self.versions, self.counted = self.versions + edits, True
        return edits


@dataclass(frozen=True)
class PassGroup:
    """Buckets of one segment that one pass covers, with the range of their parameters."""

    segment: FlatSegment
    buckets: tuple[BucketState, ...]
    region: Region
    first: int
    last: int

    @property
    def whole(self) -> slice:
        """The pass group's elements in its segment's flat tensors."""
        return slice(
            min(bucket.layout.start for bucket in self.buckets), max(bucket.layout.stop for bucket in self.buckets)
        )

    def bump_versions(self) -> None:
        """Tell autograd that the parameters were written, which is no edit."""
        self.segment.bump_versions(self.first, self.last)
        for bucket in self.buckets:
            bucket.versions += bucket.layout.last - bucket.layout.first

    def drop_gradients(self) -> None:
        """Free the parameters' gradients."""
        for param in self.segment.params[self.first : self.last]:
            param.grad = None

    @property
    def numbers(self) -> Iterator[int]:
        """The buckets' places in the order of buckets."""
        return (bucket.number for bucket in self.buckets)


class Buckets:
    """All buckets of an optimizer.

    Attributes:
        all: in the order of backward, which all ranks share.
        singles: the pass groups over each of them.
        wholes: the pass groups over whole segments.
    """

    def __init__(self, segments: Sequence[FlatSegment]) -> None:
        self.all: list[BucketState] = []
        self.singles: list[PassGroup] = []
        members: dict[int, list[BucketState]] = {}
        for number, (s, b) in enumerate(backward_order([segment.layout for segment in segments])):
            segment, layout = segments[s], segments[s].layout.buckets[b]
            bucket = BucketState(number, segment, layout)
            self.all.append(bucket)
            self.singles.append(PassGroup(segment, (bucket,), segment.regions[b], layout.first, layout.last))
            members.setdefault(s, []).append(bucket)
        self.wholes = [
            PassGroup(segments[s], tuple(own), segments[s].whole, 0, len(segments[s].params))
            for s, own in members.items()
        ]

    def begin_step(self) -> None:
        """No bucket's edits have been counted in this step."""
        for bucket in self.all:
            bucket.counted = False

    def count_edits(self) -> list[int]:
        """How many in-place edits each bucket has seen since it was sent."""
        return [bucket.edits() for bucket in self.all]

    def forget_edits(self, counts: Sequence[int]) -> None:
        """Set `count_edits` back, after edits that undid themselves."""
        for bucket, count in zip(self.all, counts, strict=True):
            bucket.versions += bucket.edits() - count

    def bump_versions(self) -> None:
        """Tell autograd that all parameters were written through the flat buffers."""
        for pass_group in self.wholes:
            pass_group.bump_versions()
