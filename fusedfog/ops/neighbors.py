"""Averaging and gathering over neighbours: `neighbor_allreduce`, `neighbor_allgather`, `pair_gossip`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.comm.calls import collective
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.group import GroupView, check_backend, find_group
from fusedfog.comm.mixing import mix, room_for
from fusedfog.comm.registry import communicator_for
from fusedfog.kernels import device
from fusedfog.kernels.wire import wire_format
from fusedfog.ops import control
from fusedfog.ops.compressed import check_compressible, mixing_compressed
from fusedfog.ops.edges import Edges, RecvWeights, SendWeights, gathered_edges, pair_edges, weighted_edges
from fusedfog.ops.meeting import Report, confer
from fusedfog.ops.tensors import check_dense, check_mixable, deliver, describe, flat_view
from fusedfog.ops.work import Phases, Port, Work, run
from fusedfog.topology import Topology

_NUMBER = 2
"""Of the operations' communicator among those of its ranks."""


@overload
def neighbor_allreduce(
    x: Tensor,
    topology: Topology | str | None = None,
    step: int = 0,
    *,
    self_weight: float | None = None,
    recv_weights: RecvWeights | None = None,
    send_weights: SendWeights | None = None,
    out: Tensor | None = None,
    async_op: Literal[False] = False,
    check: bool = True,
    wire_dtype: torch.dtype | str | None = None,
    residual: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor: ...
@overload
def neighbor_allreduce(
    x: Tensor,
    topology: Topology | str | None = None,
    step: int = 0,
    *,
    self_weight: float | None = None,
    recv_weights: RecvWeights | None = None,
    send_weights: SendWeights | None = None,
    out: Tensor | None = None,
    async_op: Literal[True],
    check: bool = True,
    wire_dtype: torch.dtype | str | None = None,
    residual: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Work: ...
@collective("neighbor_allreduce()")
def neighbor_allreduce(
    x: Tensor,
    topology: Topology | str | None = None,
    step: int = 0,
    *,
    self_weight: float | None = None,
    recv_weights: RecvWeights | None = None,
    send_weights: SendWeights | None = None,
    out: Tensor | None = None,
    async_op: bool = False,
    check: bool = True,
    wire_dtype: torch.dtype | str | None = None,
    residual: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor | Work:
    """Weighted average of x with the neighbours' tensors.

        out_i = self_weight_i * x_i + sum_j recv_weights_i[j] * send_weights_j[i] * x_j

    Without weights they are those of round `step` of the topology: X+ = W X (Xiao and Boyd 2004). With explicit
    weights, which may change at every call:
        self_weight and recv_weights, together, replace the topology's weights. The edges are then
          - what recv_weights and send_weights name, if send_weights is given too (a topology only limits them);
          - the topology's, if one is given; a neighbour that recv_weights leaves out counts 0;
          - what recv_weights name, on all ranks: the check tells each rank who expects its tensor.
        send_weights alone multiply what is sent along the topology's edges, on top of its weights.

    Arithmetic is float32 (float64 for float64 and complex128) whatever the dtype, in ascending rank order, so results
    repeat bit for bit; a complex tensor is averaged as its real and imaginary parts. send_weights other than 1 round the
    message to x's dtype. A tensor that has weight 0 on the way is not looked at: its NaNs stay where they are. Others' spread,
    as in torch; the optimizers' nonfinite= is no concern of operations.

    Compressed, every rank sends q = decode(encode(x + residual)), keeps what q lacks, residual <- x + residual - q, for its
    next message (error feedback, DeepSqueeze: Tang et al. 2019), and the weights apply to what was sent:

        out_i = (x_i - q_i) + self_weight_i * q_i + sum_j recv_weights_i[j] * q_j

    Equal messages leave x as it is, and sums over the ranks that the weights conserve are conserved to rounding.

    Args:
        x: any shape, 0-d and empty included, contiguous or not, CPU or CUDA; floating point (64, 32, bf16, fp16) or
            complex. Equal shape and dtype on both ends of each edge. Never modified; unchanged until `wait`.
        topology, step: the round of a Topology of the group's size, or its name; None is `exponential`.
        self_weight: weight of the rank's own tensor.
        recv_weights: {rank: weight} of what is received; may be empty.
        send_weights: {rank: factor} of what is sent, or a list of ranks for factors of 1; may be empty.
        out: written to instead of a new tensor, same shape, dtype and device; may be x.
        async_op: return a `Work` whose `wait()` gives the output. The check is made before the call returns.
        check: compare edges, shapes and dtypes over the group first (one small all-reduce); the same on all ranks.
        wire_dtype: "bf16", "fp8" (e4m3), "int8" (with a scale, a power of two, for sixteen elements) or their torch dtypes,
            to send fewer bits; 2 or 1.06 bytes an element. None sends x as it is.
        residual: what earlier messages lacked, like x, overwritten; None forgets it.
        group: process group, None for the default one. Ranks are its ranks.

    Returns:
        A tensor of x's shape and dtype, or a Work. A group of one rank, or no process group: self_weight * x.

    Raises:
        TypeError: x is an integer or boolean tensor, or not a dense tensor.
        ValueError: bad weights, ranks, step or topology, send_weights other than 1 or values that are not finite in
            compressed messages (on GPUs these are not looked for, and are left out), on this rank or, with the check, on
            any; with the check also
            (MismatchError) edges, shapes or dtypes that two ranks do not agree on, on all ranks. Nothing has been sent.
        PeerTimeout, ExchangeError: a rank did not come, or has gone.
    """
    operation = "neighbor_allreduce"
    source, view = check_dense(x, operation), find_group(group)

    codes = wire_format(wire_dtype)

    def resolve() -> Edges:
        check_mixable(x, out)
        edges = weighted_edges(view.rank, view.size, topology, step, self_weight, recv_weights, send_weights)
        if codes is not None:
            check_compressible(source, residual, edges)
        return edges

    what = describe(x) + ("" if codes is None else f" sent as {str(codes).removeprefix('torch.')}")
    edges, port = agree_on_edges(operation, view, source, what, check, resolve)
    if codes is not None:
        return run(mixing_compressed(operation, port, source, edges, out, codes, residual), source, async_op)
    return run(_mixing(operation, view.rank, port, source, edges, out), source, async_op)


@overload
def pair_gossip(
    x: Tensor,
    peer: int | None,
    *,
    weight: float = 0.5,
    out: Tensor | None = None,
    async_op: Literal[False] = False,
    check: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor: ...
@overload
def pair_gossip(
    x: Tensor,
    peer: int | None,
    *,
    weight: float = 0.5,
    out: Tensor | None = None,
    async_op: Literal[True],
    check: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Work: ...
@collective("pair_gossip()")
def pair_gossip(
    x: Tensor,
    peer: int | None,
    *,
    weight: float = 0.5,
    out: Tensor | None = None,
    async_op: bool = False,
    check: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor | Work:
    """Average with one other rank: ``(1 - weight) * x + weight * x_peer`` (Boyd et al. 2006).

    Collective with the check: ranks without a partner call it with `peer=None` and get a copy of x.

    Args:
        peer: the partner, which must name this rank, or None.
        weight: of the partner's tensor.

    Shapes, dtypes, other arguments, returned value and errors are those of `neighbor_allreduce`.
    """
    operation = "pair_gossip"
    source, view = check_dense(x, operation), find_group(group)

    def resolve() -> Edges:
        check_mixable(x, out)
        return pair_edges(view.rank, view.size, peer, weight)

    edges, port = agree_on_edges(operation, view, source, describe(x), check, resolve)
    return run(_mixing(operation, view.rank, port, source, edges, out), source, async_op)


@overload
def neighbor_allgather(
    x: Tensor,
    topology: Topology | str | None = None,
    step: int = 0,
    *,
    recv_ranks: Sequence[int] | None = None,
    send_ranks: Sequence[int] | None = None,
    async_op: Literal[False] = False,
    check: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor: ...
@overload
def neighbor_allgather(
    x: Tensor,
    topology: Topology | str | None = None,
    step: int = 0,
    *,
    recv_ranks: Sequence[int] | None = None,
    send_ranks: Sequence[int] | None = None,
    async_op: Literal[True],
    check: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Work: ...
@collective("neighbor_allgather()")
def neighbor_allgather(
    x: Tensor,
    topology: Topology | str | None = None,
    step: int = 0,
    *,
    recv_ranks: Sequence[int] | None = None,
    send_ranks: Sequence[int] | None = None,
    async_op: bool = False,
    check: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Tensor | Work:
    """The neighbours' tensors, concatenated along dim 0, without the rank's own.

    In ascending rank order, or in the order of `recv_ranks`. Sizes of dim 0 may differ between ranks; neighbours tell
    each other theirs before the call returns, also with `async_op`. A 0-d tensor counts as one of shape [1].

    Args:
        x: [d0, ...] of any dtype, any shape, contiguous or not, CPU or CUDA; dims 1 and up and the dtype are equal on
            both ends of each edge. Never modified; unchanged until `wait`.
        topology: whose edges of round `step` are used; a Topology, its name, or None for `exponential`.
        recv_ranks: ranks to receive from, instead of the topology's. If only one of recv_ranks and send_ranks is given,
            the other is the topology's if a topology is given, and else what the other ranks' arguments say (needs
            the check).
        send_ranks: ranks to send to, instead of the topology's.
        async_op, check, group: as in `neighbor_allreduce`.

    Returns:
        [sum of the neighbours' d0, ...], dim 0 empty without neighbours; or a Work.

    Raises:
        TypeError: x is not a dense tensor.
        ValueError, PeerTimeout, ExchangeError: as in `neighbor_allreduce`.
    """
    operation = "neighbor_allgather"
    source, view = check_dense(x, operation), find_group(group)
    source = source.resolve_conj().resolve_neg().contiguous()
    source = source.reshape(1) if source.dim() == 0 else source
    about = describe(source, f"({', '.join(['any', *map(str, source.shape[1:])])})")

    def resolve() -> Edges:
        return gathered_edges(view.rank, view.size, topology, step, recv_ranks, send_ranks)

    edges, port = agree_on_edges(operation, view, source, about, check, resolve)
    return run(_gathering(port, source, edges, _exchange_sizes(port, source, edges)), source, async_op)


def agree_on_edges(
    operation: str, view: GroupView, x: Tensor, about: str, check: bool, resolve: Callable[[], Edges]
) -> tuple[Edges, Port | None]:
    """Read this rank's arguments with `resolve` and check them with the group's other ranks.

    Returns:
        The edges, complete, and the way to the other ranks; None if there are none.

    Raises:
        TypeError, ValueError: what `resolve` raised here; MismatchError if another rank's did, or ends do not meet.
    """
    edges, problem = Edges(1.0, {}, {}), None
    try:
        edges = resolve()
    except (TypeError, ValueError) as error:
        problem = error
    where = f"rank {view.rank}: {operation}"
    if view.size > 1 and check:
        recv = None if edges.recv is None else tuple(edges.recv)
        send = None if edges.send is None else tuple(edges.send)
        own = Report(view.rank, operation, about, recv, send, None if problem is None else str(problem))
        edges = _completed(edges, confer([open_communicator(view, x.device)], own))
    if problem is not None:
        raise type(problem)(f"{where}: {problem}") from problem
    if view.size == 1:
        return Edges(edges.self_weight, edges.recv or {}, edges.send or {}), None
    if edges.recv is None or edges.send is None:
        side = "send to" if edges.send is None else "receive from"
        raise ValueError(
            f"{where}: with check=False nothing tells this rank whom to {side}; give both sides' ranks, or a topology"
        )
    return edges, Port(open_communicator(view, x.device))


def open_communicator(view: GroupView, place: torch.device) -> Communicator:
    """The operations' communicator for tensors on `place`: on CPUs one of their own, on GPUs that of the optimizers.

    gloo ends the process where two collective operations of different sizes meet: one rank's check of an operation, and the
    average that the others' step takes. (NCCL waits, and its communicators take memory.)

    Raises:
        ValueError: for a CUDA device in a process group without NCCL.
    """
    check_backend(view, place)
    return communicator_for(view, place, number=0 if device.on_gpu(place) else _NUMBER)


def _completed(edges: Edges, report: Report) -> Edges:
    recv = dict.fromkeys(report.recv or (), 1.0) if edges.recv is None else edges.recv
    send = dict.fromkeys(report.send or (), 1.0) if edges.send is None else edges.send
    return Edges(edges.self_weight, recv, send)


def _mixing(operation: str, rank: int, port: Port | None, x: Tensor, edges: Edges, out: Tensor | None) -> Phases:
    flat = flat_view(x)
    recv, send = edges.recv or {}, edges.send or {}
    inbox = [room_for(len(flat), flat) for _ in recv]
    if port is not None:
        sends = [(peer, _scaled(flat, factor)) for peer, factor in send.items()]
        tag = port.tags(1)[0]
        yield port.start(sends, list(zip(recv, inbox, strict=True)), tag, operation)
    result = room_for(len(flat), flat).copy_(flat)
    mix(result, inbox, edges.self_weight, list(recv.values()), sum(peer < rank for peer in recv))
    return deliver(result, x, out)


def _scaled(flat: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return flat
    # 0 * NaN would be NaN.
    return flat * factor if factor else torch.zeros_like(flat)


def _exchange_sizes(port: Port | None, x: Tensor, edges: Edges) -> list[int]:
    """Dim 0 of what each rank of `edges.recv` will send."""
    if port is None:
        return []
    own = dict.fromkeys(edges.send or (), len(x))
    return control.tell(port.communicator, own, list(edges.recv or ()), port.tags(1)[0], "neighbor_allgather, sizes")


def _gathering(port: Port | None, x: Tensor, edges: Edges, sizes: list[int]) -> Phases:
    result = x.new_empty((sum(sizes), *x.shape[1:]))
    if port is not None:
        flat = x.reshape(-1)
        places = [(peer, part.reshape(-1)) for peer, part in zip(edges.recv or (), result.split(sizes), strict=True)]
        tag = port.tags(1)[0]
        yield port.start([(peer, flat) for peer in edges.send or ()], places, tag, "neighbor_allgather")
    return result
