"""The exchange on two levels: the mean inside each machine, mixed across machines, W_machine (x) J_local on a mesh.

Ranks of a machine that have equal tensors already, since they average gradients, leave out the first phase.

With L local ranks on each machine, the one at local coordinate l owns shard l of a flat tensor, 1/L of it:

    inside    every rank sends shard l to its owner, who takes the mean: (L-1)/L of the tensor out, as much in
    across    the owner exchanges the mean with the owners of shard l on the neighbour machines: 1/L per neighbour
    inside    the owner sends the mixed shard to the other local ranks: (L-1)/L out and in

Between two neighbour machines the tensor so travels once, in L parallel streams, and no rank is a leader. Inside (`inside.py`),
the transfers are direct, by messages or through memory. All ranks of a machine get the same bits.

Places are coordinates on the mesh, dim 0 across machines and dim 1 inside: the round of the topology, the owners of
shards and the order of sums. A process group numbers the same ranks in ascending order, which may be another one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, TypeAlias

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fusedfog.comm.finite import settle
from fusedfog.comm.group import GroupView, find_group, part_of
from fusedfog.comm.mixing import mix, room_for
from fusedfog.comm.transfer import PeerTensor, Transfer
from fusedfog.kernels import device
from fusedfog.topology import Round

Refuse: TypeAlias = Callable[[Iterable[int]], None]


@dataclass(frozen=True)
class MeshLine:
    """This rank's place along one dimension of a mesh.

    Attributes:
        view: the ranks along it.
        place: this rank's coordinate.
        members: the group rank at each coordinate.
    """

    view: GroupView
    place: int
    members: tuple[int, ...]

    @property
    def size(self) -> int:
        """How many ranks there are along it."""
        return len(self.members)

    @property
    def others(self) -> list[int]:
        """The coordinates of the other ranks."""
        return [place for place in range(self.size) if place != self.place]

    @property
    def ranks(self) -> list[int]:
        """The global rank at each coordinate."""
        return [self.view.ranks[member] for member in self.members]

    def addressed(self, tensors: Iterable[tuple[int, Tensor]]) -> list[PeerTensor]:
        """(coordinate, tensor) pairs addressed to ranks of the group; empty tensors do not travel."""
        return [(self.members[place], tensor) for place, tensor in tensors if tensor.numel()]


def mesh_lines(mesh: DeviceMesh) -> tuple[MeshLine, MeshLine]:
    """This rank's lines on a two-dimensional mesh that it is in: across machines, and inside its machine."""
    return _line(mesh, 0), _line(mesh, 1)


def machine_lines(view: GroupView, machines: Sequence[Sequence[int]]) -> tuple[MeshLine, MeshLine]:
    """This rank's lines where no mesh was given: across machines, and inside its own.

    Args:
        machines: the ranks of `view` on each machine, as many on every one; all ranks are there.
    """
    machine = next(place for place, members in enumerate(machines) if view.rank in members)
    local = machines[machine].index(view.rank)
    return _part(view, [members[local] for members in machines], machine), _part(view, machines[machine], local)


def _part(view: GroupView, members: Sequence[int], place: int) -> MeshLine:
    ranks = [view.ranks[member] for member in members]
    part = part_of(view, ranks)
    return MeshLine(part, place, tuple(part.ranks.index(rank) for rank in ranks))


def _line(mesh: DeviceMesh, dim: int) -> MeshLine:
    here = mesh.get_coordinate()
    assert here is not None
    along = mesh.mesh[:, here[1]] if dim == 0 else mesh.mesh[here[0]]
    view = find_group(mesh.get_group(dim))
    return MeshLine(view, here[dim], tuple(view.ranks.index(rank) for rank in along.tolist()))


def shards_of(flat: Tensor, count: int) -> list[Tensor]:
    """A flat tensor's shards, one for each local rank, as even as they can be."""
    cuts = [i * len(flat) // count for i in range(count + 1)]
    return [flat[first:last] for first, last in pairwise(cuts)]


class Carrier(Protocol):
    """What starts transfers among the ranks of a line, as `Communicator.start` does."""

    def start(self, sends: list[PeerTensor], recvs: list[PeerTensor], *, tag: int, label: str) -> Transfer:
        """Post sends and receives, to and from group ranks."""


@dataclass(frozen=True)
class Path:
    """How one phase travels: what carries it, and the tag that tells its transfers from others in flight there."""

    carrier: Carrier
    tag: int

    def start(self, sends: list[PeerTensor], recvs: list[PeerTensor], label: str) -> Transfer:
        """Post sends and receives."""
        return self.carrier.start(sends, recvs, tag=self.tag, label=label)


class Inside(Protocol):
    """How ranks of one machine pass on shards of a flat tensor; see `inside.py`."""

    line: MeshLine
    collects: bool

    def room(self, numel: int, like: Tensor) -> Tensor:
        """Room for this rank's shard while it is mixed, and until it has been handed round."""
        ...

    def collect(self, sent: Tensor, take: Take, label: str) -> Iterator[Transfer]:
        """Call `take` with what the other ranks' `sent` hold of this rank's shard; only where it `collects`."""
        ...

    def hand_round(self, own: Sequence[Tensor], places: Sequence[Sequence[Tensor]], label: str) -> Iterator[Transfer]:
        """Fill the shards of all coordinates but the own one; `own` are those that fill one `room`, one behind another."""
        ...


Take: TypeAlias = Callable[[dict[int, Tensor]], None]
"""Does something with the same shard of other ranks, by coordinate; it may write to it."""


def exchange(
    sent: Tensor,
    received: Tensor,
    round_: Round,
    across: MeshLine,
    path: Path | None,
    inside: Inside,
    label: str,
    refuse: Refuse | None = None,
) -> Iterator[Transfer]:
    """The phases of one exchange, each yielded once it has been started and waited for by whoever asks for the next.

    Args:
        sent: this rank's flat tensor; only read, by the first phase.
        received: of the same length; holds sum_b W[a, b] mean_b after the last phase, for a rank of machine a.
        round_: the machine's round of the topology.
        across, path: the line across machines, and the way along it; None if there is only one.
        inside: the way inside the machine. If that does not collect, its ranks have equal tensors.
        label: what this is, for errors.
        refuse: on CPUs, leave elements that are not finite out of all means, and call this with the global ranks that they came
            from, from any thread; None mixes them.
    """
    line = inside.line
    places = shards_of(received, line.size)
    shard = shards_of(sent, line.size)[line.place]
    own = inside.room(len(shard), sent).copy_(shard)

    def take(came: dict[int, Tensor]) -> None:
        share = 1.0 / line.size
        if refuse is not None:
            _settle(own, came, dict.fromkeys(came, share), line, refuse)
        mix(own, list(came.values()), share, [share] * len(came), line.place)

    if inside.collects:
        yield from inside.collect(sent, take, f"{label}, to the owners inside")
    if path is not None:
        came = {machine: room_for(len(own), sent) for machine in round_.recv}
        to_machines = across.addressed((machine, own) for machine in round_.send)
        yield path.start(to_machines, across.addressed(came.items()), f"{label}, across machines")
        if refuse is not None:
            _settle(own, came, round_.recv, across, refuse)
        _mix_machines(own, came, round_, across.place)
    places[line.place].copy_(own)
    yield from inside.hand_round([own], [[place] for place in places], f"{label}, from the owners inside")


def pass_on(
    sent: Sequence[Tensor],
    received: Mapping[int, Sequence[Tensor]],
    groups: int,
    round_: Round,
    across: MeshLine,
    path: Path | None,
    inside: Inside,
    label: str,
) -> Iterator[Transfer]:
    """Bring every rank what neighbour machines send, where all ranks of a machine send the same; phases as those of `exchange`.

    Args:
        sent: flat tensors of this machine.
        received: by machine of the round, where those of that machine arrive.
        groups: every tensor belongs to so many groups of elements, and shards are whole groups.
        round_, across, path, inside, label: as for `exchange`; nothing is collected.
    """
    if path is None or not (round_.send or round_.recv):
        return
    line = inside.line
    own = [pieces_of(tensor, line.size, groups)[line.place] for tensor in sent]
    places = [
        [pieces_of(tensor, line.size, groups)[place] for tensors in received.values() for tensor in tensors]
        for place in range(line.size)
    ]
    sizes = [len(piece) for piece in own] * len(received)
    came = list(inside.room(sum(sizes), sent[0].view(torch.uint8)).split(sizes)) if sizes else []
    sources = [machine for machine in received for _ in own]
    to_machines = across.addressed((machine, piece) for machine in round_.send for piece in own)
    from_machines = across.addressed(zip(sources, came, strict=True))
    yield path.start(to_machines, from_machines, f"{label}, across machines")
    for piece, place in zip(came, places[line.place], strict=True):
        place.copy_(piece)
    if came:
        yield from inside.hand_round(came, places, f"{label}, from the owners inside")


def pieces_of(tensor: Tensor, count: int, groups: int) -> list[Tensor]:
    """The shards of a flat tensor that is `groups` groups long, as bytes, one for each local rank."""
    flat = tensor.view(torch.uint8)
    unit = len(flat) // groups
    cuts = [i * groups // count * unit for i in range(count + 1)]
    return [flat[first:last] for first, last in pairwise(cuts)]


def _settle(
    own: Tensor, came: Mapping[int, Tensor], weights: Mapping[int, float], line: MeshLine, refuse: Refuse
) -> None:
    """Make all finite, as far as any of them is; see `exchange`."""
    if device.on_gpu(own):
        return
    places = list(came)
    bad = settle(own, list(came.values()), [weights[place] for place in places])
    if bad:
        refuse([line.ranks[places[k] if k >= 0 else line.place] for k in bad])


def _mix_machines(own: Tensor, came: Mapping[int, Tensor], round_: Round, machine: int) -> None:
    below = sum(other < machine for other in came)
    mix(own, list(came.values()), round_.self_weight, list(round_.recv.values()), below)
