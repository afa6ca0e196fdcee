"""Sums and shards of flat tensors between ranks of one host, through shared memory instead of sockets.

Each rank writes what it has into a buffer (`shared_buffers`) where the others read it. For a sum over L ranks

    READY    all have written: rank l adds up shard l of all buffers, an L-th, in ascending rank order, into its own
    SUMMED   the owner of a shard has done so: the others copy it into theirs
    READ     all have copied: the buffer is its owner's again

so that a rank reads its gradients' length twice and writes it once, whatever L is, and all ranks end with the same bits, the same
in every run. What a loop over TCP costs beside that are the copies into the kernel and out of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fusedfog.comm.failures import LOOK_EVERY
from fusedfog.comm.shared_buffers import Buffer, Kind, Operation, Steps
from fusedfog.comm.transfer import Owner, Transfer
from fusedfog.comm.whereabouts import name_ranks

_CHUNK = 1 << 15
"""Elements that are added, or copied, at a time: they stay in the caches, and torch takes no further threads for so few, which
would be in the way of those that compute."""


class SharedTransfer(Transfer):
    """An operation of a `SharedBuffers` as others wait for it."""

    def __init__(self, communicator: Owner, label: str, operation: Operation) -> None:
        super().__init__(communicator, label)
        self._operation, self._shared = operation, operation.buffer.shared

    def done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return self._operation.over.is_set()

    def wait(self) -> None:
        """Wait until the operation is over, and the buffer this rank's own again.

        Raises:
            PeerTimeout, ExchangeError: see `Transfer`.
        """
        first = self.peers_in_flight()
        self.finish()
        error = self._operation.failure
        if error is not None and not isinstance(error, ConnectionError):
            raise error
        if self.failure is not None:
            self.failure = self.communicator.conclude(self.failure, first)
            raise self.failure

    def finish(self) -> None:
        """As `wait`; what failed is kept. A rank that dies closes its connections, which ends the operation at once."""
        deadline = time.monotonic() + self.communicator.timeout.total_seconds()
        while self.failure is None and not self._operation.over.wait(LOOK_EVERY):
            if self.communicator.ended is not None:
                self.failure = self.communicator.ended
            elif time.monotonic() > deadline:
                late = name_ranks(self._shared.missing(self._operation))
                self._shared.give_up()
                self.failure = self.communicator.failure(TimeoutError("timed out"), f"{self.label}: waiting for {late}")
        if self.failure is None and isinstance(self._operation.failure, ConnectionError):
            ranks = name_ranks(self._operation.ranks)
            self.failure = self.communicator.failure(self._operation.failure, f"{self.label}: reading from {ranks}")

    def peers_in_flight(self) -> list[int]:
        """Group ranks that it waits for."""
        return list(self._shared.missing(self._operation))


def add_up(buffer: Buffer, numel: int, dtype: torch.dtype) -> Operation:
    """Replace what is in all ranks' buffers, [numel], by its sum; 16-bit values are added in float32."""
    return buffer.shared.start(buffer, _add_up(buffer, buffer.room(numel, dtype)))


def _add_up(buffer: Buffer, own: Tensor) -> Steps:
    shared, numel = buffer.shared, len(own)
    shards = [slice(rank * numel // shared.size, (rank + 1) * numel // shared.size) for rank in range(shared.size)]
    yield Kind.READY, shared.others
    here = shards[shared.rank]
    peers = {rank: shared.peer(rank, buffer, numel, own.dtype) for rank in shared.others}
    _sum([(own if rank == shared.rank else peers[rank])[here] for rank in range(shared.size)], own[here])
    shared.tell(Kind.SUMMED, buffer)
    for rank in shared.others:
        yield Kind.SUMMED, (rank,)
        _copy(peers[rank][shards[rank]], own[shards[rank]])
    shared.tell(Kind.READ, buffer)
    yield Kind.READ, shared.others


def hand_round(buffer: Buffer, places: Mapping[int, Sequence[Tensor]]) -> Operation:
    """Copy what other ranks have at the beginning of their buffers to flat tensors of one dtype, by rank, one behind another."""
    return buffer.shared.start(buffer, _hand_round(buffer, places))


def _hand_round(buffer: Buffer, places: Mapping[int, Sequence[Tensor]]) -> Steps:
    shared = buffer.shared
    for rank in shared.others:
        yield Kind.READY, (rank,)
        sizes = [len(place) for place in places[rank]]
        flat = shared.peer(rank, buffer, sum(sizes), places[rank][0].dtype)
        for piece, place in zip(flat.split(sizes), places[rank], strict=True):
            _copy(piece, place)
    shared.tell(Kind.READ, buffer)
    yield Kind.READ, shared.others


def collect(
    buffer: Buffer,
    numel: int,
    dtype: torch.dtype,
    take: Callable[[Mapping[int, Tensor]], None],
) -> Operation:
    """Call `take` with all other ranks' buffers, [numel], by rank; nobody writes to his own until all have done so.

    It is called in the thread, and may write where no other rank reads.
    """
    return buffer.shared.start(buffer, _collect(buffer, numel, dtype, take))


def _collect(
    buffer: Buffer,
    numel: int,
    dtype: torch.dtype,
    take: Callable[[Mapping[int, Tensor]], None],
) -> Steps:
    shared = buffer.shared
    yield Kind.READY, shared.others
    take({rank: shared.peer(rank, buffer, numel, dtype) for rank in shared.others})
    shared.tell(Kind.READ, buffer)
    yield Kind.READ, shared.others


def _sum(parts: Sequence[Tensor], total: Tensor) -> None:
    """The sum of some tensors, in this order, into the last place that it is written to; `total` may be one of them."""
    first, *middle = parts
    wide = torch.float32 if total.dtype in (torch.bfloat16, torch.float16) else total.dtype
    scratch = torch.empty(min(_CHUNK, len(total)), dtype=wide)
    for begin in range(0, len(total), _CHUNK):
        here = slice(begin, begin + _CHUNK)
        so_far = scratch[: len(total[here])]
        if wide != total.dtype:
            so_far.copy_(first[here])
            for part in middle:
                so_far.add_(part[here])
            total[here].copy_(so_far)
            continue
        running = first[here]
        for part in middle[:-1]:
            running = torch.add(running, part[here], out=so_far)
        torch.add(running, middle[-1][here], out=total[here])


def _copy(source: Tensor, target: Tensor) -> None:
    for one, other in zip(source.split(_CHUNK), target.split(_CHUNK), strict=True):
        other.copy_(one)
