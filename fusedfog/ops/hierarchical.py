"""Averaging between machines of what is averaged inside them, every local rank carrying its share of the tensor.

With L ranks on each machine, local rank l owns shard l of the tensor, 1/L of it:

    inside    every rank sends shard l to local rank l, who takes the mean: (L-1)/L of the tensor out, as much in
    across    local rank l exchanges the mean of shard l with local rank l of each neighbour machine: 1/L per neighbour
    inside    local rank l sends the averaged shard l to the others: (L-1)/L out and in

Between two neighbour machines the tensor so travels once, in L parallel streams. Inside, the transfers are direct: gloo's
own reduce-scatter moves as much as an all-reduce.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fusedfog.exchange import Parcel
from fusedfog.ops.edges import read_topology
from fusedfog.ops.meeting import Report, confer
from fusedfog.ops.neighbors import open_link
from fusedfog.ops.tensors import check_dense, check_mixable, deliver, describe, flat_view, mix, room_for
from fusedfog.ops.work import Phases, Port, Work, run
from fusedfog.topology import Round, Topology
from fusedfog.topology.base import whole
from fusedfog.world import World, find_world

_OPERATION = "hierarchical_neighbor_allreduce"


@dataclass(frozen=True)
class _Side:
    """This rank's place along one dimension of the mesh.

    Attributes:
        world: the ranks along it.
        place: this rank's coordinate.
        ranks: the global rank at each coordinate; a group's ranks are sorted and may be in another order.
    """

    world: World
    place: int
    ranks: list[int]

    def port(self, device: torch.device) -> Port | None:
        """The way to the other ranks along this dimension, if there are any."""
        return Port(open_link(self.world, device)) if self.world.size > 1 else None

    def parcels(self, tensors: dict[int, Tensor]) -> list[Parcel]:
        """{coordinate: tensor} addressed to ranks of the group."""
        order = self.world.ranks
        return [(order.index(self.ranks[place]), tensor) for place, tensor in tensors.items()]


@overload
def hierarchical_neighbor_allreduce(
    x: Tensor,
    machine_topology: Topology | str | None = None,
    step: int = 0,
    *,
    mesh: DeviceMesh,
    out: Tensor | None = None,
    async_op: Literal[False] = False,
    check: bool = True,
) -> Tensor: ...
@overload
def hierarchical_neighbor_allreduce(
    x: Tensor,
    machine_topology: Topology | str | None = None,
    step: int = 0,
    *,
    mesh: DeviceMesh,
    out: Tensor | None = None,
    async_op: Literal[True],
    check: bool = True,
) -> Work: ...
def hierarchical_neighbor_allreduce(
    x: Tensor,
    machine_topology: Topology | str | None = None,
    step: int = 0,
    *,
    mesh: DeviceMesh,
    out: Tensor | None = None,
    async_op: bool = False,
    check: bool = True,
) -> Tensor | Work:
    """Average x inside each machine, and the means between machines by a topology of machines.

        out(every rank of machine a) = sum_b W[a, b] * (mean of x over machine b),   that is (W (x) J/L) X

    A rank sends 2 (L-1)/L of the tensor inside its machine and 1/L of it to each neighbour machine (L local ranks), so
    no link between machines carries a tensor more than once and none of a machine's ranks carries more than the others.
    All ranks of a machine get the same bits. 16-bit tensors travel in 16 bits and are averaged in float32.

    Args:
        x: as in `neighbor_allreduce`; of one shape and dtype in all of the mesh. Never modified; unchanged until `wait`.
        machine_topology: a Topology with as many ranks as the mesh has machines, its name, or None for `exponential`.
        step: round of the topology.
        mesh: 2-D; dim 0 runs across machines, dim 1 over the ranks of a machine.
        out: written to instead of a new tensor; may be x.
        async_op: return a `Work`. On the CPU only the first phase runs by itself; the others begin as `wait` or
            `is_completed` is called, and several such works must be waited for in the same order on all ranks.
        check: compare shapes, dtypes and topology over the mesh first (two small all-reduces); the same on all ranks.

    Returns:
        A tensor of x's shape and dtype, or a Work.

    Raises:
        TypeError: x is an integer or boolean tensor, or not dense.
        ValueError: a mesh that is not 2-D or lacks this rank; a topology of another size than the number of machines;
            with the check also (MismatchError) shapes, dtypes or edges that ranks do not agree on, on all ranks.
        PeerTimeout, ExchangeError: a rank did not come, or has gone.
    """
    source = check_dense(x, _OPERATION)
    if mesh.ndim != 2:
        raise ValueError(
            f"{_OPERATION} needs a 2-D mesh (machines, ranks of a machine), not one of shape {tuple(mesh.shape)}"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"{_OPERATION}: this rank is not in the mesh {mesh.mesh.tolist()}")
    across, inside = _side(mesh, 0), _side(mesh, 1)
    turn = _settle(source, machine_topology, step, across, inside, out, check)
    # Tags are taken now, before any other operation begins, whenever the phases run.
    far, near = across.port(source.device), inside.port(source.device)
    tags = (*(near.tags(2) if near is not None else ()), *(far.tags(1) if far is not None else ()))
    return run(_phases(across, inside, tags, source, turn, out), source, async_op)


def _side(mesh: DeviceMesh, dim: int) -> _Side:
    place = mesh.get_coordinate()
    assert place is not None
    line = mesh.mesh[:, place[1]] if dim == 0 else mesh.mesh[place[0]]
    return _Side(find_world(mesh.get_group(dim)), place[dim], line.tolist())


def _settle(
    x: Tensor,
    topology: Topology | str | None,
    step: int,
    across: _Side,
    inside: _Side,
    out: Tensor | None,
    check: bool,
) -> Round:
    """The machine's round, once all ranks of the mesh are known to mean the same."""
    turn, problem = Round(1.0, {}, {}), None
    try:
        check_mixable(x, out)
        turn = read_topology(topology, across.world.size, "mesh's dim 0").round(across.place, whole(step, "step", 0))
    except (TypeError, ValueError) as error:
        problem = error
    links = [open_link(side.world, x.device) for side in (inside, across) if side.world.size > 1] if check else []
    if links:
        near = [rank for rank in inside.ranks if rank != inside.ranks[inside.place]]
        report = Report(
            dist.get_rank(),
            _OPERATION,
            describe(x),
            (*near, *(across.ranks[machine] for machine in turn.recv)),
            (*near, *(across.ranks[machine] for machine in turn.send)),
            None if problem is None else str(problem),
        )
        confer(links, report)
    if problem is not None:
        raise type(problem)(f"rank {dist.get_rank()}: {_OPERATION}: {problem}") from problem
    return turn


def _phases(across: _Side, inside: _Side, tags: Sequence[int], x: Tensor, turn: Round, out: Tensor | None) -> Phases:
    far, near = across.port(x.device), inside.port(x.device)
    flat, local, me = flat_view(x), inside.world.size, inside.place
    lengths = [(i + 1) * len(flat) // local - i * len(flat) // local for i in range(local)]
    shards, others = flat.split(lengths), [i for i in range(local) if i != me]
    own = room_for(lengths[me], flat).copy_(shards[me])
    if near is not None:
        inbox = {i: room_for(len(own), flat) for i in others}
        sends = inside.parcels({i: shards[i] for i in others})
        yield near.start(sends, inside.parcels(inbox), tags[0], f"{_OPERATION}, to the owners inside")
        mix(own, list(inbox.values()), 1 / local, [1 / local] * len(others), me)
    inbox = {machine: room_for(len(own), flat) for machine in turn.recv}
    if far is not None:
        sends = across.parcels(dict.fromkeys(turn.send, own))
        yield far.start(sends, across.parcels(inbox), tags[-1], f"{_OPERATION}, across")
    place = sum(machine < across.place for machine in turn.recv)
    mix(own, list(inbox.values()), turn.self_weight, list(turn.recv.values()), place)
    result = flat.new_empty(len(flat))
    parts = result.split(lengths)
    parts[me].copy_(own)
    if near is not None:
        sends = inside.parcels(dict.fromkeys(others, own))
        recvs = inside.parcels({i: parts[i] for i in others})
        yield near.start(sends, recvs, tags[1], f"{_OPERATION}, from the owners inside")
    return deliver(result, x, out)
