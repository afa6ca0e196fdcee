"""Buckets on their way through steps: a `BucketState` is one bucket, a `PassGroup` those of a segment that one pass covers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from operator import add

from torch import Tensor

from fusedfog.comm.transfer import Transfer
from fusedfog.kernels import CompressedChannel, Region
from fusedfog.params.flat import FlatSegment
from fusedfog.params.homes import MANY, PARTS
from fusedfog.params.layout import Bucket, backward_order


@dataclass(frozen=True)
class Inbox:
    """What a pass mixes: for each message its K neighbours' tensors, their weights, and the weight of what was sent.

    Compressed messages are codes, with `scales`, and belong to `channels`, this rank's own ends. With `numbers`, what counts is
    what they hold when the pass is made; see `kernels.Pass`. `ranks` are the neighbours, by group rank; averages have none.
    `kept` tensors are read again by later steps, so nobody may write into them.
    """

    tensors: tuple[tuple[Tensor, ...], ...] = ()
    weights: tuple[float, ...] = ()
    row_sum: float = 1.0
    scales: tuple[tuple[Tensor | None, ...], ...] = ()
    channels: tuple[CompressedChannel, ...] = ()
    numbers: Tensor | None = None
    ranks: tuple[int, ...] = ()
    kept: bool = False


EMPTY = Inbox()


_QUIET = 64
"""Exchanges without an edit after which earlier ones no longer count."""


@dataclass
class Refusals:
    """Which exchanges of a bucket leave its edited parameters as they are, and which mix them all the same.

    Code that edits at every step, or at every second one, must not end the mixing, nor that with the same neighbours each
    time. So after the n-th refusal, n exchanges are mixed whatever happens: of edits at every step those number 0, 2, 5, 9,
    14 are refused, which is no period that a topology could share.
    """

    made: int = 0
    pending: int = 0
    quiet: int = 0

    def refuse(self, edited: bool) -> bool:
        """Whether to refuse this exchange's inbox; to be asked once for every exchange."""
        self.quiet = 0 if edited else self.quiet + 1
        if self.quiet >= _QUIET:
            self.made = 0
        if self.pending:
            self.pending -= 1
            return False
        if edited:
            self.made += 1
            self.pending = self.made
        return edited


@dataclass(eq=False)
class BucketState:
    """One bucket: its place in the order of buckets, and its message in flight.

    Attributes:
        number: its place among the mixed buckets, the same on all ranks; of one that is not mixed, a number behind all those.
        place: its place among all buckets.
        inbox, sources: where what the message brings will be, and from whom it comes.
        versions: the sums of the bucket's version counters that there would be without edits since it was sent: one of all
            its parameters, or of many one of every fourth, from the first, the second and so on.
        counted: `versions` is up to date: it was read in this step, in which only passes have written.
        altered: a sample of its parameters is not what was sent; see `samples`.
        refusals: which inboxes are not mixed, since the parameters had been edited.
        noticed: how many of its exchanges found edits, as far as the host has noticed them in time.
        ready: how many of its gradients have come in this step, under fused_backward.
    """

    number: int
    place: int
    segment: FlatSegment
    layout: Bucket
    transfer: Transfer | None = None
    inbox: Inbox = EMPTY
    sources: Iterable[object] = ()
    versions: list[int] = field(default_factory=list)
    counted: bool = False
    altered: bool = False
    refusals: Refusals = field(default_factory=Refusals)
    noticed: int = 0
    ready: int = 0
    _next_part: int = 0
    _own_writes: list[int] = field(init=False)

    def __post_init__(self) -> None:
        many = self.layout.last - self.layout.first >= MANY
        self.versions = [0] * (PARTS if many else 1)
        first, last, parts = self.layout.first, self.layout.last, len(self.versions)
        self._own_writes = [len(range(first + part, last, parts)) for part in range(parts)]

    @property
    def whole(self) -> slice:
        """The bucket's elements in its segment's flat tensors."""
        return slice(self.layout.start, self.layout.stop)

    def _read_versions(self) -> list[int]:
        parts = len(self.versions)
        return [self.segment.versions(self.layout, part, parts) for part in range(parts)]

    def edits(self) -> int:
        """In-place edits of the bucket's parameters since it was sent."""
        return sum(self._read_versions()) - sum(self.versions)

    def count_edits(self) -> int:
        """The same, forgetting them."""
        before, self.versions, self.counted = self.versions, self._read_versions(), True
        return sum(self.versions) - sum(before)

    def count_some_edits(self) -> int:
        """The same of every fourth of many parameters, others at each call; what is not seen now is seen by a later call.

        Only where nobody but passes writes between this call and the next message: `count_edits` there forgets all.
        """
        part, parts = self._next_part, len(self.versions)
        self._next_part = (part + 1) % parts
        found = self.segment.versions(self.layout, part, parts)
        edits, self.versions[part], self.counted = found - self.versions[part], found, True
        return edits

    def expect_edits(self, count: int) -> None:
        """Have `edits` find that many."""
        self.versions = self._read_versions()
        self.versions[0] -= count

    def count_own_writes(self) -> None:
        """A pass has written every parameter once."""
        self.versions = list(map(add, self.versions, self._own_writes))


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
            bucket.count_own_writes()

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

    Args:
        before: how they were laid out before segments were added; buckets that are there already stay what they are.

    Attributes:
        all: in the order of backward, which all ranks share as far as mixed ones are concerned.
        singles: the pass groups over each of them.
        wholes: the pass groups over whole segments.
    """

    def __init__(self, segments: Sequence[FlatSegment], before: Buckets | None = None) -> None:
        self.all: list[BucketState] = []
        self.singles: list[PassGroup] = []
        members: dict[int, list[BucketState]] = {}
        known = {id(bucket.layout): bucket for bucket in before.all} if before is not None else {}
        # Numbers tell messages apart, so ranks that have different unmixed parameters must not number them differently.
        numbers = {
            True: count(),
            False: count(sum(len(one.layout.buckets) for one in segments if one.layout.mix)),
        }
        for place, (s, b) in enumerate(backward_order([segment.layout for segment in segments])):
            segment, layout = segments[s], segments[s].layout.buckets[b]
            number = next(numbers[segment.layout.mix])
            bucket = known.get(id(layout)) or BucketState(number, place, segment, layout)
            bucket.number, bucket.place = number, place
            self.all.append(bucket)
            self.singles.append(PassGroup(segment, (bucket,), segment.regions[b], layout.first, layout.last))
            members.setdefault(s, []).append(bucket)
        self.wholes = [
            PassGroup(segments[s], tuple(own), segments[s].whole, 0, len(segments[s].params))
            for s, own in members.items()
        ]

    def parts(self, pass_group: PassGroup) -> list[PassGroup]:
        """The pass groups over each bucket of this one, in the order in which they are sent."""
        return [self.singles[bucket.place] for bucket in pass_group.buckets]

    def begin_step(self) -> None:
        """No bucket's edits have been counted in this step."""
        for bucket in self.all:
            bucket.counted = False

    def count_edits(self) -> list[int]:
        """How many in-place edits each bucket has seen since it was sent."""
        return [bucket.edits() for bucket in self.all]

    def forget_edits(self, counts: Sequence[int]) -> None:
        """Set `count_edits` back, after edits that undid themselves."""
        for bucket, edits in zip(self.all, counts, strict=True):
            bucket.expect_edits(edits)

    def forget_edits_of(self, segment: FlatSegment, positions: Iterable[int]) -> None:
        """Of these parameters of a segment, each has just been counted as edited once, and was not."""
        for position in positions:
            for bucket in self.all:
                if bucket.segment is segment and bucket.layout.first <= position < bucket.layout.last:
                    bucket.versions[(position - bucket.layout.first) % len(bucket.versions)] += 1

    def bump_versions(self) -> None:
        """Tell autograd that all parameters were written through the flat buffers."""
        for pass_group in self.wholes:
            pass_group.bump_versions()
