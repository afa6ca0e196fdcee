"""Packs: small buckets that travel as one message, since a message of its own would cost more than their bytes.

Every param group is a segment and has buckets of its own, so 300 groups are 300 messages: on two gloo ranks with 16 kB each,
50 of a step's 70 ms. A pack copies what its buckets send into one buffer, and receives into one whose pieces are their inboxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from fusedfog.gossip.buckets import BucketState
from fusedfog.params.flat import FlatSegment

SMALL = 1 << 18
"""Bytes of the largest bucket that is packed: above, a copy costs as much as a message."""

FEWEST = 4
"""Buckets of the smallest pack."""

LARGEST = 1 << 23
"""Bytes that a pack does not exceed by more than its last bucket, so that the first ones need not wait for hundreds."""


class Pack:
    """Some buckets, each all of its segment, and the buffer that they are sent from.

    A pack leaves when all of its buckets are ready: `held` has those that are, for exchange number `exchange`.
    """

    def __init__(self, buckets: Sequence[BucketState]) -> None:
        self.buckets = tuple(buckets)
        self.exchange = -1
        self.held: set[BucketState] = set()
        self._buffers: dict[str, Tensor] = {}

    @property
    def segments(self) -> tuple[FlatSegment, ...]:
        """Those of the buckets."""
        return tuple(bucket.segment for bucket in self.buckets)

    def hold(self, bucket: BucketState, exchange: int) -> bool:
        """Take a bucket that is ready; whether it was the last one, so that the pack is to be sent."""
        if exchange != self.exchange:
            self.exchange = exchange
            self.held.clear()
        self.held.add(bucket)
        complete = len(self.held) == len(self.buckets)
        if complete:
            self.held.clear()
        return complete

    def buffer(self, name: str) -> Tensor:
        """Where the flat tensors `name` of all segments are sent from, one after the other."""
        if name not in self._buffers:
            like = self.segments[0].tensor(name)
            self._buffers[name] = like.new_zeros(sum(segment.layout.numel for segment in self.segments))
        return self._buffers[name]

    def load(self, names: Sequence[str]) -> None:
        """Copy what the flat tensors `names` are now into the buffers."""
        for name in names:
            torch.cat([segment.tensor(name) for segment in self.segments], out=self.buffer(name))


def packs_of(buckets: Sequence[BucketState]) -> list[Pack]:
    """The packs of these buckets, in their order, the same on all ranks: of mixed ones that are small and alone in a segment."""
    small = [
        bucket
        for bucket in buckets
        if bucket.segment.layout.mix and len(bucket.segment.layout.buckets) == 1 and _bytes(bucket) <= SMALL
    ]
    packs: list[Pack] = []
    # Sorting keeps the order of those of one dtype.
    for _, members in groupby(sorted(small, key=_dtype), _dtype):
        some: list[BucketState] = []
        for bucket in members:
            some.append(bucket)
            if sum(map(_bytes, some)) >= LARGEST:
                packs.append(Pack(some))
                some = []
        packs.append(Pack(some))
    return [pack for pack in packs if len(pack.buckets) >= FEWEST]


def _bytes(bucket: BucketState) -> int:
    layout = bucket.segment.layout
    return layout.numel * layout.dtype.itemsize


def _dtype(bucket: BucketState) -> str:
    return str(bucket.segment.layout.dtype)
