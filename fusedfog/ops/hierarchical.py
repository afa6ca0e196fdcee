"""Averaging between machines of what is averaged inside them; see `two_level` for how it travels."""

from __future__ import annotations

from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from fusedfog.comm.calls import collective
from fusedfog.comm.inside import ByMessages
from fusedfog.comm.two_level import MeshLine, Path, exchange, mesh_lines
from fusedfog.ops.edges import read_topology
from fusedfog.ops.meeting import Report, confer
from fusedfog.ops.neighbors import open_communicator
from fusedfog.ops.tensors import check_dense, check_mixable, deliver, describe, flat_view
from fusedfog.ops.work import Phases, Port, Work, run
from fusedfog.topology import Round, Topology
from fusedfog.topology.round import whole

_OPERATION = "hierarchical_neighbor_allreduce"


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
@collective("hierarchical_neighbor_allreduce()")
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
    across, inside = mesh_lines(mesh)
    round_ = _confer(source, machine_topology, step, across, inside, out, check)
    # Tags are taken now, before any other operation begins, whenever the phases run.
    path, by_messages = _paths(across, inside, source.device)
    return run(_phases(source, round_, across, path, by_messages, out), source, async_op)


def _confer(
    x: Tensor,
    topology: Topology | str | None,
    step: int,
    across: MeshLine,
    inside: MeshLine,
    out: Tensor | None,
    check: bool,
) -> Round:
    """The machine's round, once all ranks of the mesh are known to mean the same."""
    round_, problem = Round(1.0, {}, {}), None
    try:
        check_mixable(x, out)
        round_ = read_topology(topology, across.size, "mesh's dim 0").round(across.place, whole(step, "step", 0))
    except (TypeError, ValueError) as error:
        problem = error
    links = [open_communicator(line.view, x.device) for line in (inside, across) if line.size > 1] if check else []
    if links:
        near = [inside.ranks[place] for place in inside.others]
        report = Report(
            dist.get_rank(),
            _OPERATION,
            describe(x),
            (*near, *(across.ranks[machine] for machine in round_.recv)),
            (*near, *(across.ranks[machine] for machine in round_.send)),
            None if problem is None else str(problem),
        )
        confer(links, report)
    if problem is not None:
        raise type(problem)(f"rank {dist.get_rank()}: {_OPERATION}: {problem}") from problem
    return round_


def _paths(across: MeshLine, inside: MeshLine, device: torch.device) -> tuple[Path | None, ByMessages]:
    """The ways of one operation's phases, with tags of their own; the two phases inside share a communicator."""
    collect = across_machines = hand_round = None
    if inside.size > 1:
        port = Port(open_communicator(inside.view, device))
        collect, hand_round = (Path(port, tag) for tag in port.tags(2))
    if across.size > 1:
        port = Port(open_communicator(across.view, device))
        across_machines = Path(port, port.tags(1)[0])
    return across_machines, ByMessages(inside, collect, hand_round)


def _phases(
    x: Tensor, round_: Round, across: MeshLine, path: Path | None, inside: ByMessages, out: Tensor | None
) -> Phases:
    flat = flat_view(x)
    result = flat.new_empty(len(flat))
    yield from exchange(flat, result, round_, across, path, inside, _OPERATION)
    return deliver(result, x, out)
