"""`neighbor_allreduce`, `pair_gossip` and `neighbor_allgather` between real processes, against dense algebra."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Outcome, Pool
from support.waits import meet, shorten

import fusedfog
from fusedfog import topology as topologies
from fusedfog.comm.communicator import Communicator
from fusedfog.ops import neighbor_allgather, neighbor_allreduce, pair_gossip

TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 1e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
    torch.complex64: 1e-6,
    torch.complex128: 1e-13,
}
SHAPES: tuple[tuple[int, ...], ...] = ((5, 3), (), (0, 4), (130,), (2, 3, 4, 5))


def value(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """What rank `rank` starts with; every rank can make everyone's."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1000 * seed + rank))


def stacked(n: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> np.ndarray:
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return np.stack([value(rank, shape, dtype, seed).to(wide).numpy() for rank in range(n)])


def assert_mixed(y: torch.Tensor, weights: np.ndarray, x: np.ndarray, what: str) -> None:
    expected = np.tensordot(weights[dist.get_rank()], x, axes=1)
    wide = torch.complex128 if y.is_complex() else torch.float64
    bound = TOLERANCE[y.dtype] * max(1.0, float(np.abs(x).max(initial=0)))
    assert tuple(y.shape) == x.shape[1:], what
    np.testing.assert_allclose(y.to(wide).numpy(), expected, rtol=0, atol=bound, err_msg=what)


def static_graphs(n: int) -> list[topologies.Topology]:
    skewed = np.eye(n) * 0.5
    skewed[:, 0] += 0.5
    return [
        topologies.ring(n),
        topologies.ring(n, "left"),
        topologies.ring(n, "right"),
        topologies.star(n, center=n - 1),
        topologies.grid(n),
        topologies.fully_connected(n),
        topologies.exponential(n),
        topologies.symmetric_exponential(n),
        topologies.hypercube(n),
        topologies.from_matrix(skewed),
        topologies.from_matrix(skewed.T, stochastic="column"),
        topologies.ring(n).lazy(),
    ]


def sequences(n: int) -> list[topologies.Topology]:
    return [
        topologies.one_peer(topologies.star(n)),
        topologies.one_peer_exponential(n),
        topologies.one_peer_hypercube(n),
        topologies.inner_outer_ring(2, n // 2),
        topologies.inner_outer_exponential(2, n // 2),
        topologies.alternating_exponential_ring(n // 2, 2),
        topologies.base_graph(n, 2),
        topologies.equi_dynamic(n, seed=3),
        topologies.random_matching(n, seed=4),
        topologies.from_rounds(n, lambda step: {step % n: {(step + 1) % n: 0.25}}, period=n),
        topologies.sequence([topologies.ring(n), topologies.star(n)]),
    ]


def equals_dense() -> None:
    n, me = dist.get_world_size(), dist.get_rank()
    for graph in static_graphs(n):
        for dtype in TOLERANCE:
            for shape in SHAPES if graph.name == "exponential" else SHAPES[:1]:
                x = value(me, shape, dtype)
                kept = x.clone()
                y = neighbor_allreduce(x, graph)
                assert y.dtype == dtype and torch.equal(x, kept)
                assert_mixed(y, graph.matrix(), stacked(n, shape, dtype), f"{graph!r} {dtype} {shape}")
    for graph in sequences(n):
        x = value(me, (7,), torch.float64)
        dense = stacked(n, (7,), torch.float64)
        for step in range(min(graph.period or 5, 8)):
            x = neighbor_allreduce(x, graph, step)
            assert_mixed(x, graph.matrix(step), dense, f"{graph!r} step {step}")
            dense = np.tensordot(graph.matrix(step), dense, axes=1)
    for named in (None, "exponential"):
        y = neighbor_allreduce(value(me, (3,), torch.float64), named)
        assert_mixed(y, topologies.exponential(n).matrix(), stacked(n, (3,), torch.float64), "by name")


@pytest.mark.parametrize("n", [4, 8])
def test_every_graph_and_sequence_equals_the_dense_product(ranks: Pool, n: int) -> None:
    ranks.run(n, equals_dense)


# -- weights given by hand ------------------------------------------------------------------------------------------


def by_hand() -> None:
    n, me = dist.get_world_size(), dist.get_rank()
    left, right = (me - 1) % n, (me + 1) % n
    big = float(2**50)
    x = torch.arange(1.0, 6.0, dtype=torch.float64) * (me + 1) + (big if me == 1 else 0)

    def of(rank: int) -> torch.Tensor:
        return torch.arange(1.0, 6.0, dtype=torch.float64) * (rank + 1) + (big if rank == 1 else 0)

    # Unit weights: exact, with the senders told whom to send to by the check, by a list, by a dict or by the topology.
    both = {left: 1.0, right: 1.0}
    for other in ({}, {"send_weights": [right, left]}, {"send_weights": both, "check": False}, {"topology": "ring"}):
        y = neighbor_allreduce(x, self_weight=1.0, recv_weights=both, **other)  # type: ignore[arg-type]
        assert torch.equal(y, x + of(left) + of(right)), other
    # A pure shift is exact too, whatever the receiver held.
    mine = torch.full_like(x, math.nan) if me == 0 else x
    y = neighbor_allreduce(mine, self_weight=0, recv_weights={left: 1}, send_weights=[right])
    assert torch.equal(y, of(left)) if left else y.isnan().all()
    # Both factors of an edge count, once each.
    y = neighbor_allreduce(x, self_weight=2.0, recv_weights={left: 3.0}, send_weights={right: float(me + 1)})
    assert torch.equal(y, 2 * x + 3 * (left + 1) * of(left))
    # A subset of a topology's neighbours: its members' tensors, not somebody else's; the others' NaNs stay away.
    mine = torch.full_like(x, math.nan) if me == 2 else x
    chosen = {} if left == 2 or me == 2 else {left: 1.0}
    y = neighbor_allreduce(mine, "ring", self_weight=0.5, recv_weights=chosen)
    assert torch.equal(y, 0.5 * x + sum(of(rank) for rank in chosen)) if me != 2 else y.isnan().all()
    # Nothing received and a weight of its own: the input is not scaled (BlueFog did).
    kept = x.clone()
    y = neighbor_allreduce(x, self_weight=0.25, recv_weights={}, send_weights=[])
    assert torch.equal(y, 0.25 * kept) and torch.equal(x, kept)
    # Factors on top of a topology's weights.
    ring = topologies.ring(n, "right")
    y = neighbor_allreduce(x, ring, send_weights={right: 2.0})
    expected = ring.round(me).self_weight * x + ring.round(me).recv[left] * 2 * of(left)
    assert torch.allclose(y, expected, rtol=1e-14)
    # Edges that change at every step: rank `step` sends to all, then receives from all.
    for step in range(n):
        others = [rank for rank in range(n) if rank != step]
        recv, send = ({}, others) if me == step else ({step: 0.5}, [])
        y = neighbor_allreduce(x, self_weight=1.0 if me == step else 0.5, recv_weights=recv, send_weights=send)
        assert torch.equal(y, x if me == step else 0.5 * x + 0.5 * of(step))
        recv, send = (dict.fromkeys(others, 1.0), []) if me == step else ({}, [step])
        y = neighbor_allreduce(x, self_weight=1.0, recv_weights=recv, send_weights=send)
        assert torch.equal(
            y, sum((of(rank) for rank in range(n)), torch.zeros(5, dtype=torch.float64)) if me == step else x
        )


def push_sum() -> tuple[float, float]:
    """Averages over an irregular digraph that only knows whom it sends to; returns the worst error and sum of p."""
    n, me = dist.get_world_size(), dist.get_rank()
    sends = sorted({(me + 1) % n, (me * me + 3) % n} - {me})
    x = torch.cat([value(me, (6,), torch.float64), torch.ones(1, dtype=torch.float64)])
    senders = [r for r in range(n) if r != me and me in {(r + 1) % n, (r * r + 3) % n} - {r}]
    share = 1 / (len(sends) + 1)
    for _ in range(80):
        x = neighbor_allreduce(
            x,
            self_weight=share,
            recv_weights=dict.fromkeys(senders, 1.0),
            send_weights=dict.fromkeys(sends, share),
            check=False,
        )
    mean = stacked(n, (6,), torch.float64).mean(axis=0)
    return float(np.abs((x[:-1] / x[-1]).numpy() - mean).max()), x[-1].item()


def gossip() -> float:
    n, me = dist.get_world_size(), dist.get_rank()
    kept = value(me, (4, 2), torch.float64)
    with_idle = pair_gossip(kept, {0: n - 1, n - 1: 0}.get(me), weight=0.25)
    partner = {0: n - 1, n - 1: 0}.get(me)
    expected = kept if partner is None else 0.75 * kept + 0.25 * value(partner, (4, 2), torch.float64)
    assert torch.allclose(with_idle, expected, rtol=1e-14) and with_idle.data_ptr() != kept.data_ptr()
    x = kept
    for bit in range(n.bit_length() - 1):
        x = pair_gossip(x, me ^ (1 << bit), check=bit % 2 == 0)
    exact = float(np.abs(x.numpy() - stacked(n, (4, 2), torch.float64).mean(axis=0)).max())
    matching, x = topologies.random_matching(n, seed=9), kept
    for step in range(60):
        x = pair_gossip(x, next(iter(matching.round(me, step).recv), None), check=False)
    return max(exact, float(np.abs(x.numpy() - stacked(n, (4, 2), torch.float64).mean(axis=0)).max()) * 1e-3)


def averages() -> list[Any]:
    by_hand()
    return [push_sum(), gossip()]


@pytest.mark.parametrize("n", [4, 8])
def test_explicit_weights_push_sum_and_gossip(ranks: Pool, n: int) -> None:
    outcome = ranks.run(n, averages)
    assert max(error for (error, _), _ in outcome) < 1e-9
    assert sum(p for (_, p), _ in outcome) == pytest.approx(n)
    assert max(error for _, error in outcome) < 1e-9


# -- gathering --------------------------------------------------------------------------------------------------------

DTYPES = (
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
)


def gather() -> None:
    n, me = dist.get_world_size(), dist.get_rank()
    left, right = (me - 1) % n, (me + 1) % n

    def of(rank: int, dtype: torch.dtype = torch.int64, width: int = 3) -> torch.Tensor:
        # Rank r has r rows: rank 0 none.
        return (torch.arange(rank * width).reshape(rank, width) * 7 + rank).remainder(100).to(dtype)

    for dtype in DTYPES:
        y = neighbor_allgather(of(me, dtype), "ring")
        expected = torch.cat([of(rank, dtype).view(torch.uint8) for rank in sorted((left, right))])
        assert y.dtype == dtype and torch.equal(y.view(torch.uint8), expected), dtype
    order = [right, left]
    for more in ({"send_ranks": order}, {"send_ranks": order, "check": False}, {}, {"topology": "ring"}):
        y = neighbor_allgather(of(me), recv_ranks=order, **more)  # type: ignore[arg-type]
        assert torch.equal(y, torch.cat([of(right), of(left)])), more
    y = neighbor_allgather(of(me), send_ranks=[right])
    assert torch.equal(y, of(left))
    others = [rank for rank in range(n) if rank]
    y = neighbor_allgather(of(me), recv_ranks=[] if me else others, send_ranks=[0] if me else [])
    assert torch.equal(y, torch.cat([of(rank) for rank in others])) if me == 0 else y.shape == (0, 3)
    one = neighbor_allgather(torch.tensor(float(me)), topologies.ring(n, "right"))
    assert torch.equal(one, torch.tensor([float(left)]))
    for shape in ((0, 3), (2, 0)):
        assert neighbor_allgather(torch.empty(shape), "exponential", async_op=True).wait().shape[1] == shape[1]
    z = torch.complex(torch.arange(4.0), torch.full((4,), float(me))).reshape(2, 2)
    y = neighbor_allgather(z.T.conj(), topologies.ring(n, "right"))
    assert torch.equal(y, torch.complex(torch.arange(4.0), torch.full((4,), float(left))).reshape(2, 2).T.conj())
    works = [neighbor_allgather(of(me) + k, "ring", async_op=True) for k in range(4)]
    for k in reversed(range(4)):
        assert torch.equal(works[k].wait(), torch.cat([of(rank) for rank in sorted((left, right))]) + k)


@pytest.mark.parametrize("n", [4, 8])
def test_neighbor_allgather(ranks: Pool, n: int) -> None:
    ranks.run(n, gather)


# -- memory and time --------------------------------------------------------------------------------------------------


def layouts() -> None:
    n, me = dist.get_world_size(), dist.get_rank()
    weights = topologies.exponential(n).matrix()
    base = stacked(n, (6, 4), torch.float32)
    views: list[tuple[str, Callable[[Any], Any]]] = [
        ("transposed", lambda a: a.swapaxes(0, 1)),
        ("strided", lambda a: a[::2, 1:]),
        ("one element", lambda a: a[3, 2]),
        ("expanded", lambda a: a[:1]),
    ]
    for what, view in views:
        x = value(me, (6, 4), torch.float32)
        kept = x.clone()
        taken = view(x).expand(5, 4) if what == "expanded" else view(x)
        every = np.stack([view(row) for row in base])
        if what == "expanded":
            every = np.broadcast_to(every, (n, 5, 4))
        assert_mixed(neighbor_allreduce(taken), weights, every, what)
        assert torch.equal(x, kept)
    x = value(me, (6, 4), torch.float32).T
    out = torch.zeros(6, 4).T[:, :]
    assert neighbor_allreduce(x, out=out) is out
    assert_mixed(out, weights, base.swapaxes(1, 2), "out=")
    assert neighbor_allreduce(x, out=x) is x
    assert_mixed(x, weights, base.swapaxes(1, 2), "out=x")
    images = value(me, (2, 3, 4, 5), torch.float32)
    # Ranks with different memory formats still mean the same elements.
    images = images.contiguous(memory_format=torch.channels_last) if me % 2 else images
    assert_mixed(neighbor_allreduce(images), weights, stacked(n, (2, 3, 4, 5), torch.float32), "formats")
    z = value(me, (3, 2), torch.complex64)
    assert_mixed(neighbor_allreduce(z.conj()), weights, stacked(n, (3, 2), torch.complex64).conj(), "conjugate")
    leaf = value(me, (3,), torch.float32).requires_grad_()
    assert not neighbor_allreduce(leaf).requires_grad
    same = torch.full((50,), 0.1, dtype=torch.bfloat16)
    for graph in ("ring", "exponential", "star"):
        assert torch.equal(neighbor_allreduce(same, graph), same), "a consensus must stay one, bit for bit"


def overlap() -> None:
    n, me = dist.get_world_size(), dist.get_rank()
    weights = topologies.exponential(n).matrix()
    shapes = [(3,), (3,), (200,), (3,), ()]
    xs = [value(me, shape, torch.float64, seed=k) for k, shape in enumerate(shapes)]
    works = [neighbor_allreduce(x, async_op=True, check=k % 2 == 0) for k, x in enumerate(xs)]
    works.append(pair_gossip(xs[0], me ^ 1, async_op=True))
    direct = neighbor_allreduce(xs[2])
    # Each rank waits in an order of its own.
    order = np.random.default_rng(me).permutation(len(shapes)).tolist()
    for k in order:
        y = works[k].wait()
        assert_mixed(y, weights, stacked(n, shapes[k], torch.float64, seed=k), f"work {k}")
        assert works[k].wait() is y and works[k].is_completed()
    assert torch.equal(direct, works[2].wait())
    deadline = time.monotonic() + 10
    while not works[-1].is_completed():
        assert time.monotonic() < deadline
    assert torch.allclose(works[-1].wait(), (xs[0] + value(me ^ 1, (3,), torch.float64)) / 2)
    # One that is dropped must not harm the others.
    neighbor_allreduce(xs[2], async_op=True)
    for _ in range(3):
        assert torch.equal(neighbor_allreduce(xs[2]), direct)
    dist.barrier()


def beside_an_optimizer() -> None:
    """Messages of operations and of an optimizer in flight together are not mixed up."""
    n, me = dist.get_world_size(), dist.get_rank()
    first = neighbor_allreduce(value(me, (8,), torch.float32), "ring")
    model = torch.nn.Linear(4, 2)
    opt = fusedfog.SGD(model.parameters(), lr=0.0, topology="ring", bucket_mb=1e-5)
    for _ in range(5):
        model(torch.ones(1, 4)).sum().backward()
        work = neighbor_allreduce(value(me, (8,), torch.float32), "ring", async_op=True)
        opt.step()
        assert torch.equal(work.wait(), first)
    assert_mixed(first, topologies.ring(n).matrix(), stacked(n, (8,), torch.float32), "beside an optimizer")
    opt.drain()


def memory_and_time() -> None:
    layouts()
    overlap()
    beside_an_optimizer()


def test_layouts_out_async_and_optimizers(ranks: Pool) -> None:
    ranks.run(4, memory_and_time)


# -- mistakes ---------------------------------------------------------------------------------------------------------

ONE_SIDED: dict[str, tuple[str, ...]] = {
    "expects": ("rank 1", "rank 3", "does not send"),
    "sends": ("rank 3", "rank 1", "does not expect"),
    "shape": ("rank 2", "(2, 3)", "(3, 2)"),
    "dtype": ("rank 2", "bfloat16", "float32"),
    "operation": ("neighbor_allgather", "neighbor_allreduce"),
    "weight": ("rank 2", "finite"),
    "integer": ("rank 2", "int64"),
    "out": ("rank 2", "out is"),
    "partner": ("rank 2", "rank 3"),
    "rows": ("rank 2", "(any, 3)", "(any, 4)"),
    "direction": ("does not",),
}


def mistaken(kind: str) -> Any:
    me, n = dist.get_rank(), dist.get_world_size()
    odd = me == 2
    x = torch.ones(2, 3)
    left, right = (me - 1) % n, (me + 1) % n
    ring: dict[str, Any] = {"self_weight": 0.5, "recv_weights": {left: 0.5}, "send_weights": [right]}
    if kind == "expects" and me == 1:
        ring["recv_weights"] = {left: 0.25, 3: 0.25}
    elif kind == "sends" and me == 3:
        ring["send_weights"] = [right, 1]
    elif kind == "shape" and odd:
        x = torch.ones(3, 2)
    elif kind == "dtype" and odd:
        x = x.bfloat16()
    elif kind == "weight" and odd:
        ring["recv_weights"] = {left: math.nan}
    elif kind == "integer" and odd:
        x = x.long()
    elif kind == "out" and odd:
        ring["out"] = torch.empty(6)
    if kind == "operation" and odd:
        return neighbor_allgather(x, recv_ranks=[left], send_ranks=[right])
    if kind == "partner":
        return pair_gossip(x, {0: 1, 1: 0, 2: 3, 3: None}[me])
    if kind == "rows":
        return neighbor_allgather(torch.ones(me, 4 if odd else 3), "ring")
    if kind == "direction":
        return neighbor_allreduce(x, topologies.ring(n, "left" if odd else "right"))
    return neighbor_allreduce(x, async_op=kind == "dtype", **ring)


def all_mistakes() -> dict[str, tuple[str, str, float]]:
    seen = {}
    for kind in ONE_SIDED:
        begin = time.monotonic()
        try:
            mistaken(kind)
        except (TypeError, ValueError) as error:
            seen[kind] = (type(error).__name__, str(error), time.monotonic() - begin)
        # Whatever went wrong, the next call is sound.
        ones = neighbor_allreduce(torch.ones(3, dtype=torch.float64))
        assert torch.equal(ones, torch.ones(3, dtype=torch.float64))
    return seen


def test_mistakes_of_one_rank_raise_on_every_rank(ranks: Pool) -> None:
    for rank, seen in enumerate(ranks.run(4, all_mistakes, pg_timeout=60)):
        assert seen.keys() == ONE_SIDED.keys()
        for kind, (name, text, seconds) in seen.items():
            own = rank == 2 and kind in ("weight", "integer", "out")
            assert name == ("TypeError" if own and kind == "integer" else "ValueError" if own else "MismatchError"), (
                kind
            )
            assert text.startswith(f"rank {rank}: ") and (own or all(word in text for word in ONE_SIDED[kind])), text
            assert seconds < 30


def alone_or_absent(kind: str) -> Any:
    if kind == "absent" and dist.get_rank() == 1:
        return None
    if kind == "unchecked":
        return neighbor_allreduce(torch.ones(2), self_weight=1.0, recv_weights={}, check=False)
    return neighbor_allreduce(torch.ones(2))


def first_contact(kind: str) -> Any:
    neighbor_allreduce(torch.ones(2))
    if kind == "absent":
        meet("contact")
        shorten(2.0)
    return alone_or_absent(kind)


def test_an_absent_rank_ends_in_an_error_and_unknown_receivers_are_refused(ranks: Pool) -> None:
    for outcome in ranks.outcomes(3, first_contact, "unchecked"):
        assert outcome.error_type == "ValueError" and "check=False" in outcome.message
    outcomes: list[Outcome] = ranks.outcomes(3, first_contact, "absent", pg_timeout=60.0)
    assert outcomes[1].ok
    for rank in (0, 2):
        assert outcomes[rank].error_type in ("PeerTimeout", "ExchangeError"), outcomes[rank].message
        assert outcomes[rank].seconds < 30


def in_a_subgroup() -> None:
    """Two disjoint groups work at the same time, by group ranks, beside the whole."""
    me = dist.get_rank()
    pairs = [dist.new_group([3, 1]), dist.new_group([0, 2])]
    mine = pairs[0] if me % 2 else pairs[1]
    y = neighbor_allreduce(torch.tensor([float(me)]), "ring", group=mine)
    assert y.item() == (2.0 if me % 2 else 1.0)
    assert pair_gossip(torch.tensor([float(me)]), 1 - dist.get_rank(mine), group=mine, weight=1.0).item() == me ^ 2
    with pytest.raises(ValueError, match="not a member"):
        neighbor_allreduce(torch.ones(1), group=pairs[me % 2])
    assert neighbor_allreduce(torch.tensor([float(me)]), "fully_connected").item() == 1.5


def counted() -> list[int]:
    """Bytes given to the link per call: the tensor once per neighbour, nothing for what is empty."""
    sent: list[int] = []
    start = Communicator.start
    Communicator.start = lambda self, sends, recvs, **kw: (  # type: ignore[method-assign]
        sent.append(sum(t.numel() * t.element_size() for _, t in sends)),
        start(self, sends, recvs, **kw),
    )[1]
    try:
        for dtype, graph in itertools.product((torch.float32, torch.bfloat16), ("ring", "exponential")):
            neighbor_allreduce(torch.ones(100, dtype=dtype), graph)
        neighbor_allreduce(torch.ones(0))
        neighbor_allgather(torch.ones(10, dtype=torch.int16), "ring")
    finally:
        Communicator.start = start  # type: ignore[method-assign]
    return sent


def test_subgroups(ranks: Pool) -> None:
    ranks.run(4, in_a_subgroup)


def test_bytes_sent(ranks: Pool) -> None:
    assert ranks.run(8, counted) == [[800, 1200, 400, 600, 0, 16, 40]] * 8
