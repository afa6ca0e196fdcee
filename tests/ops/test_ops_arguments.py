"""Operations without other ranks: reading arguments, the edge check's algebra, mixing, and a world of one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedfog import topology as topologies
from fusedfog.comm.mixing import mix, room_for
from fusedfog.ops import Work, neighbor_allgather, neighbor_allreduce, pair_gossip
from fusedfog.ops.edges import Edges, gathered_edges, pair_edges, weighted_edges
from fusedfog.ops.meeting import Report, _balance, complete, judge

NUMBERS = st.floats(-1e6, 1e6)


@st.composite
def digraphs(draw: st.DrawFn) -> tuple[int, dict[int, dict[int, float]]]:
    """(n, {receiver: {sender: weight}}) without self edges."""
    n = draw(st.integers(1, 9))
    peers = {i: draw(st.sets(st.sampled_from([j for j in range(n) if j != i]))) if n > 1 else set() for i in range(n)}
    return n, {i: {j: draw(NUMBERS) for j in chosen} for i, chosen in peers.items()}


@given(digraphs(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_weights_are_read_in_ascending_order_and_given_exactly(
    case: tuple[int, dict[int, dict[int, float]]], random: Any
) -> None:
    n, weights = case
    for rank in range(n):
        entries = list(weights[rank].items())
        random.shuffle(entries)
        send = [k for k in range(n) if rank in weights[k]]
        random.shuffle(send)
        edges = weighted_edges(rank, n, None, 0, 0.5, dict(entries), send)
        assert edges == Edges(0.5, weights[rank], dict.fromkeys(sorted(send), 1.0))
        assert list(edges.recv or ()) == sorted(weights[rank]) and list(edges.send or ()) == sorted(send)
        assert weighted_edges(rank, n, None, 0, 0.5, dict(entries), None).send is None


@given(digraphs(), st.data())
@settings(max_examples=60, deadline=None)
def test_the_check_balances_exactly_when_every_edge_has_both_ends(
    case: tuple[int, dict[int, dict[int, float]]], data: st.DataObject
) -> None:
    n, weights = case
    sends = {j: tuple(i for i in range(n) if j in weights[i]) for j in range(n)}
    reports = [Report(i, "op", "t", tuple(weights[i]), sends[i]) for i in range(n)]
    assert not any(sum(part) for part in zip(*map(_balance, reports), strict=True)) and judge(reports) == []
    hidden = [Report(r.rank, r.operation, r.tensor, r.recv, None) for r in reports]
    assert [set(r.send or ()) for r in complete(hidden)] == [set(sends[i]) for i in range(n)]
    edges = [(j, i) for i in range(n) for j in weights[i]]
    if not edges:
        return
    j, i = data.draw(st.sampled_from(edges))
    broken = {
        "no sender": (j, Report(j, "op", "t", reports[j].recv, tuple(k for k in sends[j] if k != i))),
        "no receiver": (i, Report(i, "op", "t", tuple(k for k in weights[i] if k != j), sends[i])),
        "other tensor": (i, Report(i, "op", "u", tuple(weights[i]), sends[i])),
        "other operation": (j, Report(j, "po", "t", reports[j].recv, sends[j])),
    }
    for kind, (rank, report) in broken.items():
        changed = [report if r.rank == rank else r for r in reports]
        assert any(sum(part) for part in zip(*map(_balance, changed), strict=True)), kind
        faults = judge(changed)
        assert any(f"rank {i}" in fault and f"rank {j}" in fault for fault in faults), kind


def edges_of(**more: Any) -> Edges:
    keywords = {"topology": None, "step": 0, "self_weight": None, "recv_weights": None, "send_weights": None} | more
    return weighted_edges(1, 4, *keywords.values())  # type: ignore[arg-type]


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "self weight alone": ({"self_weight": 0.5}, ValueError, "without recv_weights"),
    "receive weights alone": ({"recv_weights": {0: 0.5}}, ValueError, "without self_weight"),
    "nan self weight": ({"self_weight": math.nan, "recv_weights": {}}, ValueError, "self_weight must be finite"),
    "infinite": ({"self_weight": 1, "recv_weights": {0: math.inf}}, ValueError, r"recv_weights\[0\] must be finite"),
    "nan sent": ({"send_weights": {0: math.nan}}, ValueError, r"send_weights\[0\] must be finite"),
    "no number": ({"self_weight": "much", "recv_weights": {}}, ValueError, "number"),
    "itself": ({"self_weight": 1, "recv_weights": {1: 0.5}}, ValueError, "rank 1 itself"),
    "itself sent": ({"self_weight": 1, "recv_weights": {}, "send_weights": [1]}, ValueError, "rank 1 itself"),
    "out of range": ({"self_weight": 1, "recv_weights": {4: 0.5}}, ValueError, "no rank 4"),
    "negative rank": ({"self_weight": 1, "recv_weights": {-1: 0.5}}, ValueError, "at least 0"),
    "fractional rank": ({"self_weight": 1, "recv_weights": {0.5: 0.5}}, ValueError, "whole number"),
    "twice": ({"self_weight": 1, "recv_weights": {}, "send_weights": [0, 2, 0]}, ValueError, "rank 0 twice"),
    "a list of weights": ({"self_weight": 1, "recv_weights": [0.5]}, TypeError, "dict"),
    "sends of another kind": ({"send_weights": 3}, TypeError, "list of ranks"),
    "not a neighbour": ({"topology": "ring", "self_weight": 1, "recv_weights": {3: 1.0}}, ValueError, "rank 3"),
    "not a receiver": ({"topology": "ring", "send_weights": {0: 1, 2: 1, 3: 1}}, ValueError, "rank 3"),
    "left out": ({"topology": "ring", "send_weights": {0: 1.0}}, ValueError, "leaves out rank 2"),
    "too large": ({"topology": topologies.ring(5)}, ValueError, "5 ranks but the group has 4"),
    "too small": ({"topology": topologies.ring(3)}, ValueError, "3 ranks but the group has 4"),
    "unknown name": ({"topology": "circle"}, ValueError, "circle"),
    "a matrix": ({"topology": [[1.0]]}, TypeError, "from_matrix"),
    "negative step": ({"topology": "ring", "step": -1}, ValueError, "step"),
    "fractional step": ({"topology": "ring", "step": 0.5}, ValueError, "step"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_refused(case: str) -> None:
    keywords, error, text = BAD[case]
    with pytest.raises(error, match=text):
        edges_of(**keywords)


def test_topology_and_weights_together() -> None:
    ring = edges_of(topology="ring")
    assert ring.recv is not None and list(ring.recv) == [0, 2] and ring.send == {0: 1.0, 2: 1.0}
    assert edges_of(topology="ring", self_weight=1, recv_weights={2: 0.5}) == Edges(1.0, {0: 0.0, 2: 0.5}, ring.send)
    chosen = edges_of(topology="ring", self_weight=1, recv_weights={2: 0.5}, send_weights=[0])
    assert chosen == Edges(1.0, {2: 0.5}, {0: 1.0})
    assert edges_of(topology="ring", send_weights={2: 3, 0: 2}).send == {0: 2.0, 2: 3.0}


def test_gathering_and_pairs() -> None:
    assert list(gathered_edges(1, 4, None, 0, [3, 0], [2]).recv or ()) == [3, 0]
    assert gathered_edges(1, 4, None, 0, None, [2]).recv is None
    for recv, text in (([0, 0], "twice"), ([1], "itself"), ([7], "no rank 7")):
        with pytest.raises(ValueError, match=text):
            gathered_edges(1, 4, None, 0, recv, [])
    with pytest.raises(TypeError, match="list of ranks"):
        gathered_edges(1, 4, None, 0, {0: 1.0}, [])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank 3"):
        gathered_edges(1, 4, "ring", 0, [3], None)
    assert pair_edges(1, 4, None, 0.5) == Edges(1.0, {}, {})
    for peer, weight, text in ((1, 0.5, "itself"), (4, 0.5, "no rank 4"), (0, math.nan, "finite")):
        with pytest.raises(ValueError, match=text):
            pair_edges(1, 4, peer, weight)


@given(st.data(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=60, deadline=None)
def test_mix_is_the_weighted_sum(data: st.DataObject, dtype: torch.dtype) -> None:
    count, k = data.draw(st.integers(0, 70)), data.draw(st.integers(0, 4))
    weights = data.draw(st.lists(st.floats(-2, 2), min_size=k, max_size=k))
    own_weight = data.draw(st.one_of(st.floats(-2, 2), st.just(1 - math.fsum(weights)), st.just(0.0)))
    place = data.draw(st.integers(0, k))
    tensors = [torch.randn(count, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(k + 1)]
    own = room_for(count, tensors[0]).copy_(tensors[0])
    mix(own, tensors[1:], own_weight, weights, place)
    factors = [own_weight, *weights]
    exact = sum(
        (f * t.double() for f, t in zip(factors, tensors, strict=True)), torch.zeros(count, dtype=torch.float64)
    )
    size = sum(abs(f) for f in factors) * 4 + 1
    error = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    torch.testing.assert_close(own.double(), exact, rtol=0, atol=error * size)


def test_weights_of_zero_and_nans() -> None:
    nan = torch.full((3,), math.nan)
    own = nan.clone()
    mix(own, [torch.ones(3), nan], 0.0, [1.0, 0.0], 1)
    assert torch.equal(own, torch.ones(3))
    own = torch.full((3,), 1e20)
    mix(own, [torch.full((3,), 3.0)], 0.0, [1.0], 0)
    assert torch.equal(own, torch.full((3,), 3.0)), "nothing of the rank's own value may be left, not even by rounding"


# -- one rank ---------------------------------------------------------------------------------------------------------


def test_alone_everything_is_its_own_neighbourhood() -> None:
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    for y in (neighbor_allreduce(x), neighbor_allreduce(x, "ring", 3), pair_gossip(x, None)):
        assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()
    assert torch.equal(neighbor_allreduce(x, self_weight=2, recv_weights={}), 2 * x)
    assert neighbor_allgather(x).shape == (0, 4) and neighbor_allgather(torch.tensor(1)).shape == (0,)
    work = neighbor_allreduce(x, async_op=True)
    assert isinstance(work, Work) and work.is_completed() and work.wait() is work.wait()
    out = torch.zeros(4, 3, dtype=torch.bfloat16).T
    assert neighbor_allreduce(x, out=out) is out and torch.equal(out, x)


def test_alone_bad_arguments_are_refused() -> None:
    x = torch.ones(3)
    for wrong in (torch.ones(2), torch.ones(3, dtype=torch.float64), torch.ones(3, 1)):
        with pytest.raises(ValueError, match="rank 0: neighbor_allreduce: out is"):
            neighbor_allreduce(x, out=wrong)
    for dtype in (torch.int64, torch.bool, torch.uint8, torch.float8_e5m2):
        for call in (neighbor_allreduce, lambda t: pair_gossip(t, None)):
            with pytest.raises(TypeError, match="floating"):
                call(torch.ones(3).to(dtype))
        assert neighbor_allgather(torch.ones(3).to(dtype)).dtype == dtype
    for strange in (3.0, torch.ones(3, device="meta"), torch.ones(3).to_sparse()):
        with pytest.raises(TypeError, match="takes"):
            neighbor_allreduce(strange)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no rank 1"):
        pair_gossip(x, 1)
    with pytest.raises(ValueError, match="4 ranks"):
        neighbor_allreduce(x, topologies.ring(4))


def test_operations_need_a_world_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="not initialized"):
        neighbor_allreduce(torch.ones(1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_mix_on_a_gpu_equals_the_cpu(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for count in (0, 1, 63, 64, 1000, 5000):
        for own_weight, weights in ((0.5, [0.25, 0.25]), (1.0, [1.0, 1.0]), (0.0, [1.0, 0.0])):
            results = []
            for device in ("cpu", "cuda"):
                tensors = [torch.randn(count, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(3)]
                like = torch.empty(0, dtype=dtype, device=device)
                own, *inbox = [room_for(count, like).copy_(t) for t in tensors]
                mix(own, inbox, own_weight, weights, 1)
                results.append(own.cpu())
            torch.testing.assert_close(
                *results, rtol=1e-6 if dtype == torch.float32 else None, atol=None if dtype != torch.float32 else 1e-6
            )
