"""The two ways by which ranks of one machine pass on shards: by messages, and through memory that they share.

For `two_level`, which puts the phases between machines in between; both are an `Inside`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from fusedfog.comm import shared_reduce
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.mixing import room_for
from fusedfog.comm.shared_buffers import SharedBuffers
from fusedfog.comm.transfer import Transfer
from fusedfog.comm.two_level import MeshLine, Path, Take, shards_of


class ByMessages:
    """By messages from rank to rank; a phase without a path is left out.

    gloo's own reduce-scatter would move as much as an all-reduce.
    """

    def __init__(self, line: MeshLine, collect: Path | None, hand_round: Path | None) -> None:
        self.line, self.collects = line, collect is not None
        self._collect, self._hand_round = collect, hand_round

    def room(self, numel: int, like: Tensor) -> Tensor:
        """See `Inside`."""
        return room_for(numel, like)

    def collect(self, sent: Tensor, take: Take, label: str) -> Iterator[Transfer]:
        """See `Inside`."""
        assert self._collect is not None
        line, shards = self.line, shards_of(sent, self.line.size)
        came = {place: room_for(len(shards[line.place]), sent) for place in line.others}
        to_owners = line.addressed((place, shards[place]) for place in line.others)
        yield self._collect.start(to_owners, line.addressed(came.items()), label)
        take(came)

    def hand_round(self, own: Sequence[Tensor], places: Sequence[Sequence[Tensor]], label: str) -> Iterator[Transfer]:
        """See `Inside`."""
        if self._hand_round is not None:
            line = self.line
            to_others = line.addressed((place, piece) for place in line.others for piece in own)
            from_owners = line.addressed((place, piece) for place in line.others for piece in places[place])
            yield self._hand_round.start(to_others, from_owners, label)


class ThroughMemory:
    """Through buffers that the ranks share, for one exchange at a time: the others read where a shard was made.

    Args:
        collects: whether the ranks have different tensors.
    """

    def __init__(self, line: MeshLine, communicator: Communicator, shared: SharedBuffers, *, collects: bool) -> None:
        self.line, self.collects = line, collects
        self._communicator = communicator
        self._shard, self._whole = shared.buffer(), shared.buffer()

    def room(self, numel: int, like: Tensor) -> Tensor:
        """See `Inside`."""
        return self._shard.room(numel, like.dtype)

    def collect(self, sent: Tensor, take: Take, label: str) -> Iterator[Transfer]:
        """See `Inside`."""
        line = self.line
        shards = shards_of(self._whole.room(len(sent), sent.dtype), line.size)
        for place, shard in enumerate(shards_of(sent, line.size)):
            if place != line.place:
                shards[place].copy_(shard)

        def take_own(came: Mapping[int, Tensor]) -> None:
            wholes = {place: came[line.members[place]] for place in line.others}
            take({place: shards_of(whole, line.size)[line.place] for place, whole in wholes.items()})

        operation = shared_reduce.collect(self._whole, len(sent), sent.dtype, take_own)
        yield shared_reduce.SharedTransfer(self._communicator, label, operation)

    def hand_round(self, own: Sequence[Tensor], places: Sequence[Sequence[Tensor]], label: str) -> Iterator[Transfer]:
        """See `Inside`."""
        targets = {self.line.members[place]: places[place] for place in self.line.others}
        operation = shared_reduce.hand_round(self._shard, targets)
        yield shared_reduce.SharedTransfer(self._communicator, label, operation)
