"""Where each parameter lives: flat offsets, buckets and kernel blocks, as pure data.

Parameters of one param group, dtype and `mix` flag form a *segment*, one flat buffer, in which frozen ones have no place.
Inside it every parameter starts at a multiple of `ALIGNMENT` elements, in registration order. Consecutive parameters form
*buckets* of at most about `bucket_mb`, the unit of exchange, cut from the last parameter on, whose gradient comes first
(`cut`); a bucket is cut into *blocks* of at most `BLOCK` elements that never cross a parameter, the unit of work of one kernel
program. The same inputs give the same layout on every rank; nothing here is traced at run time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fusedfog.kernels.region import BLOCK, align

LEAST = 2**19
"""Bytes of the smallest graded bucket: a message costs 0.3 ms of CPU on gloo, in which 10 Gbit/s carry 0.4 MB."""

SHARE = 16
"""A graded bucket is no larger than this part of what is cut."""


@dataclass(frozen=True)
class ParamSpec:
    """What the layout needs to know of a parameter.

    `depth` orders parameters by when the forward pass meets them (0 first); backward finishes them in the reverse order.
    `room` is how many elements to keep for it, if that is more than it has (`shards`). Of one that is not `trained`, being
    frozen, only what ranks must agree on is told.
    """

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    group: int
    mix: bool
    depth: float
    room: int = 0
    trained: bool = True

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def is_trained(param: torch.Tensor) -> bool:
    """Whether an optimizer is to update a parameter; torch.optim does so with whatever has a gradient, frozen or not."""
    return param.requires_grad or param.grad is not None


@dataclass(frozen=True)
class Slot:
    """A parameter's place: elements `[start, start + numel)` of its segment, in the memory order given by `stride`."""

    index: int
    start: int
    spec: ParamSpec

    @property
    def stop(self) -> int:
        """One past the last element."""
        return self.start + self.spec.numel


@dataclass(frozen=True)
class Bucket:
    """Parameters `[first, last)` of a segment, in its elements `[start, stop)`; the unit of exchange."""

    first: int
    last: int
    start: int
    stop: int
    depth: float


@dataclass(frozen=True)
class Segment:
    """One flat buffer: the parameters of one param group and dtype that are all mixed, or all not."""

    group: int
    dtype: torch.dtype
    mix: bool
    slots: tuple[Slot, ...]
    buckets: tuple[Bucket, ...]
    numel: int


def build_layout(specs: Sequence[ParamSpec], bucket_bytes: int, *, graded: bool) -> tuple[Segment, ...]:
    """Lay parameters out in segments and buckets.

    Args:
        specs: one per parameter, in registration order; `Slot.index` counts in this order. Frozen ones get no place.
        bucket_bytes, graded: see `cut`.

    Raises:
        ValueError: if `bucket_bytes` is not positive.
    """
    if bucket_bytes <= 0:
        raise ValueError(f"bucket size must be positive, got {bucket_bytes} bytes; 25 MB is a good bucket_mb")
    families: dict[tuple[int, torch.dtype, bool], list[tuple[int, ParamSpec]]] = {}
    for index, spec in enumerate(specs):
        if spec.trained:
            families.setdefault((spec.group, spec.dtype, spec.mix), []).append((index, spec))
    return tuple(_segment(members, bucket_bytes, graded) for members in families.values())


def _segment(members: list[tuple[int, ParamSpec]], bucket_bytes: int, graded: bool) -> Segment:
    slots: list[Slot] = []
    at = 0
    for index, spec in members:
        slots.append(Slot(index, at, spec))
        at = align(at + max(spec.numel, spec.room))
    spec = members[0][1]
    return Segment(spec.group, spec.dtype, spec.mix, tuple(slots), cut(slots, at, bucket_bytes, graded=graded), at)


def cut(slots: Sequence[Slot], numel: int, bucket_bytes: int, *, graded: bool) -> tuple[Bucket, ...]:
    """Buckets of the parameters of a segment of `numel` elements, in its order.

    They are cut from the last parameter on, the order in which backward brings gradients. A bucket is closed once it holds
    `bucket_bytes`, or `graded_bytes` if `graded`. Parameters are not divided, so a large one makes a large bucket.
    """
    itemsize = slots[0].spec.dtype.itemsize
    found: list[Bucket] = []
    last, stop = len(slots), numel
    for first in reversed(range(len(slots))):
        start = slots[first].start
        limit = graded_bytes((numel - stop) * itemsize, numel * itemsize, bucket_bytes) if graded else bucket_bytes
        if (stop - start) * itemsize >= limit or first == 0:
            depth = min(slot.spec.depth for slot in slots[first:last])
            found.append(Bucket(first, last, start, stop, depth))
            last, stop = first, start
    return tuple(reversed(found))


def graded_bytes(done: float, total: float, bucket_bytes: float) -> float:
    """Bytes of the next bucket in the order of gradients, where messages travel under backward.

        min(bucket_bytes, max(LEAST, min(done, total / SHARE, (total - done) / 2)))

    A network that is slower than backward loses the time until the first bucket has its gradients, a faster one the time that
    the last bucket travels, and one that is as fast the time of the largest bucket: so they grow from a small one and shrink
    to a small one, by doubling and by halving, and no one is a large part of all.

    Args:
        done: bytes of the buckets before.
        total: bytes of all buckets.
        bucket_bytes: of the largest one.
    """
    return min(bucket_bytes, max(LEAST, min(done, total / SHARE, (total - done) / 2)))


def backward_order(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Every (segment, bucket) in the order in which backward completes them.

    A bucket is complete when its shallowest parameter has its gradient, so buckets come by descending depth of that
    parameter. All ranks pass over and exchange buckets in this one order: NCCL matches messages by order alone. How mixed
    buckets lie to each other does not depend on others, which may differ by rank.
    """
    keyed = [(-bucket.depth, s, b) for s, segment in enumerate(segments) for b, bucket in enumerate(segment.buckets)]
    return [(s, b) for _, s, b in sorted(keyed)]


def block_table(segment: Segment, bucket: Bucket) -> np.ndarray:
    """Blocks of a bucket: int64 `[B, 4]` of (parameter in segment, offset in parameter, valid length, flat start)."""
    slots = segment.slots[bucket.first : bucket.last]
    numels = np.fromiter((slot.spec.numel for slot in slots), np.int64, len(slots))
    starts = np.fromiter((slot.start for slot in slots), np.int64, len(slots))
    counts = -(-numels // BLOCK)
    # No Python loop over rows, of which 7B parameters have seven million.
    first_rows = np.repeat(np.cumsum(counts) - counts, counts)
    rows = np.empty((len(first_rows), 4), np.int64)
    rows[:, 0] = np.repeat(np.arange(bucket.first, bucket.last), counts)
    np.multiply(np.arange(len(rows)) - first_rows, BLOCK, out=rows[:, 1])
    np.minimum(np.repeat(numels, counts) - rows[:, 1], BLOCK, out=rows[:, 2])
    np.add(np.repeat(starts, counts), rows[:, 1], out=rows[:, 3])
    return rows
