"""Edits that no version counter sees: a sample of what was sent, compared with what the next step finds.

`p.data.copy_(...)`, a numpy view or a detached alias write parameters without a word to autograd. So at the end of a step,
when the parameters travel, some words of every bucket are kept, and the next step looks whether they are still there: at
least 256 elements of each bucket (all of smaller ones), spread over it, and one of every parameter.

A CPU tells at once which buckets were edited. A GPU counts them, two small launches a step, and the host reads the counts
some steps later without a wait.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fusedfog.gossip.buckets import BucketState
from fusedfog.gossip.late_read import LateRead
from fusedfog.kernels import device
from fusedfog.params.flat import FlatSegment
from fusedfog.params.layout import Slot

ELEMENTS = 256
"""Of a bucket that has as many."""

BLOCK = 256
"""Words that belong to one bucket; `kernels.samples.BLOCK`, which needs Triton."""

REPORTED_EVERY = 8
"""Steps between two copies of a GPU's counts to the host, which cost it as much as the launches."""


def by_kernel(tensor: Tensor) -> bool:
    """Whether the GPU's kernel takes it."""
    return tensor.is_cuda


def places(slots: Sequence[Slot], seed: int) -> npt.NDArray[np.int64]:
    """The elements of a bucket with these parameters that are sampled: one of each parameter, `ELEMENTS` in all or more.

    Each parameter is cut into equal parts and one element of each part drawn, the same ones on every call: equal distances
    could fall into one column of a matrix.
    """
    draw = np.random.default_rng(seed)
    total = sum(slot.spec.numel for slot in slots)
    found = []
    for slot in slots:
        size = slot.spec.numel
        count = size if total <= ELEMENTS else -(-ELEMENTS * size // total)
        edges = np.arange(count + 1) * size // max(count, 1)
        found.append(slot.start + edges[:-1] + (draw.random(count) * np.diff(edges)).astype(np.int64))
    return np.concatenate(found)


@dataclass(frozen=True)
class Sample:
    """The sampled words of one segment.

    Attributes:
        bits: the segment's parameters as 16-bit words.
        words: int64, those that are sampled, `BLOCK` by `BLOCK` of one bucket; seen: int16, what they were.
        owners: the bucket of each block.
    """

    bits: Tensor
    words: npt.NDArray[np.int64]
    seen: npt.NDArray[np.int16]
    owners: list[BucketState]

    @staticmethod
    def of(segment: FlatSegment, buckets: Sequence[BucketState]) -> Sample:
        """The words of these buckets of a segment."""
        width = segment.layout.dtype.itemsize // 2
        chosen, owners = [], []
        for number, bucket in enumerate(buckets):
            here = places(segment.layout.slots[bucket.layout.first : bucket.layout.last], number)
            words = (here[:, None] * width + np.arange(width)).reshape(-1)
            words = np.pad(words, (0, -len(words) % BLOCK), mode="edge") if len(words) else words
            chosen.append(words)
            owners += [bucket] * (len(words) // BLOCK)
        table = np.concatenate(chosen)
        return Sample(segment.param.view(torch.int16), table, np.zeros(len(table), np.int16), owners)

    @cached_property
    def _memory(self) -> npt.NDArray[np.int16]:
        # Not torch's operations: of some hundred numbers they cost three times as much.
        found: npt.NDArray[np.int16] = self.bits.numpy()
        return found

    def keep(self) -> None:
        """Keep what the words are, on a CPU."""
        # What is out of bounds raises by default, which takes a buffer and a copy.
        self._memory.take(self.words, out=self.seen, mode="clip")

    def edited(self) -> npt.NDArray[np.bool_] | None:
        """Which blocks are not as they were kept; None if all are."""
        now = self._memory.take(self.words)
        if np.array_equal(now, self.seen):
            return None
        differs: npt.NDArray[np.bool_] = (now != self.seen).reshape(-1, BLOCK).any(1)
        return differs


class Samples:
    """The samples of one optimizer's buckets.

    Attributes:
        kept: there is something to compare with.
    """

    def __init__(self) -> None:
        self.kept = False
        self._buckets: list[BucketState] = []
        self._samples: list[Sample] = []
        self._counts: DeviceCounts | None = None

    def lay_out(self, buckets: Sequence[BucketState]) -> None:
        """Sample these buckets, those that are mixed, from now on; those that are sampled already go on as they are."""
        mixed = [bucket for bucket in buckets if bucket.segment.layout.mix]
        if len(mixed) == len(self._buckets) and all(a is b for a, b in zip(mixed, self._buckets, strict=True)):
            return
        self.kept, self._buckets = False, mixed
        members: dict[int, list[BucketState]] = {}
        for bucket in mixed:
            members.setdefault(id(bucket.segment), []).append(bucket)
        self._samples = [Sample.of(own[0].segment, own) for own in members.values()]
        self._samples = [sample for sample in self._samples if sample.owners]
        on_gpu = bool(self._samples) and device.on_gpu(self._samples[0].bits)
        self._counts = DeviceCounts(self._samples) if on_gpu else None

    def keep(self) -> None:
        """All buckets are being sent as they are now."""
        if not self._samples or self._buckets[0].transfer is None:
            return
        self.kept = True
        if self._counts is not None:
            self._counts.keep()
            return
        for sample in self._samples:
            sample.keep()

    def find(self) -> Sequence[tuple[BucketState, int]]:
        """Before any pass of a step: mark the buckets that were edited since they were sent as `altered`, on CPUs.

        Returns:
            On GPUs, buckets that were edited some steps ago without anybody noticing, and how often.
        """
        if not self.kept:
            return ()
        self.kept = False
        if self._counts is not None:
            return self._counts.compare()
        for sample in self._samples:
            edited = sample.edited()
            if edited is not None:
                for bucket, differs in zip(sample.owners, edited.tolist(), strict=True):
                    bucket.altered |= differs
        return ()


class DeviceCounts:
    """Comparisons that stay on a GPU: counts of edits by block, which the host reads when they have come.

    Their kernel is compiled at construction.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self._owners = [bucket for sample in samples for bucket in sample.owners]
        place = samples[0].bits.device
        words = np.concatenate([sample.words * 2 + sample.bits.data_ptr() for sample in samples])
        self._addresses = torch.from_numpy(words).to(place)
        self._seen = torch.zeros(len(words), dtype=torch.int16, device=place)
        self._edits = torch.zeros(len(self._owners), device=place)
        self._steps = 0
        self._reports = LateRead()
        self._told: tuple[list[float], list[int]] = ([0.0] * len(self._owners), [0] * len(self._owners))
        self._launches: list[Callable[[], None]] = []
        if by_kernel(self._addresses):
            from fusedfog.kernels.samples import launch_of  # Needs Triton, which CPUs do without.

            tables = self._addresses, self._seen, self._edits
            self._launches = [launch_of(*tables, compare) for compare in (False, True)]

    def keep(self) -> None:
        """Keep what the words are."""
        self._launch(compare=False)

    def compare(self) -> Sequence[tuple[BucketState, int]]:
        """Count what is no longer so; returns what an earlier report told, as `Samples.find`."""
        late = self._read()
        self._steps += 1
        if self._steps % REPORTED_EVERY == 0:
            # Before this step's edits are counted, of which the host does not know yet.
            self._reports.ask(self._edits, [bucket.noticed for bucket in self._owners])
        self._launch(compare=True)
        return late

    def _read(self) -> Sequence[tuple[BucketState, int]]:
        late: dict[int, tuple[BucketState, int]] = {}
        for answer, noticed in self._reports.answers():
            (edits, known), self._told = self._told, (answer.tolist(), noticed)
            for i, bucket in enumerate(self._owners):
                more = int(self._told[0][i] - edits[i]) - (noticed[i] - known[i])
                if more > late.get(id(bucket), (bucket, 0))[1]:
                    late[id(bucket)] = (bucket, more)
        return list(late.values())

    def _launch(self, *, compare: bool) -> None:
        if self._launches:
            self._launches[compare]()
            return
        blocks = 0
        for sample in self._samples:  # A stand-in for a GPU, in tests.
            first, blocks = blocks, blocks + len(sample.owners)
            if not compare:
                sample.keep()
                continue
            edited = sample.edited()
            if edited is not None:
                self._edits.numpy()[first:blocks] += edited
