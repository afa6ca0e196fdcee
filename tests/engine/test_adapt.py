"""`adapt=`: rounds over slow edges become rarer, and usual again, on all ranks alike. Most waits are a virtual network's."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from support import problems
from support.pool import Pool

import fusedfog
from fusedfog.algorithms import TABLE
from fusedfog.engine.adapt import Adaptation, interval, relative_costs
from fusedfog.gossip.mailbox import Mailbox
from fusedfog.optim.compatibility import choose_topology
from fusedfog.optim.features import Setup
from fusedfog.simulate import Quadratics, simulate
from fusedfog.topology import base_graph, one_peer_exponential, random_matching
from fusedfog.topology.reordered import Reordered, order_of

N, D, EVERY, RATE = 4, 5, 8, 0.05

# -- orders ----------------------------------------------------------------------------------------------------------

INTERVALS = st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=5).filter(lambda found: 1 in found)


@given(INTERVALS)
def test_a_round_of_interval_k_is_used_in_every_kth_period_and_fast_ones_in_its_place(intervals: list[int]) -> None:
    order, periods = order_of(intervals), max(intervals)
    assert len(order) == periods * len(intervals)
    for period in range(periods):
        used = order[period * len(intervals) : (period + 1) * len(intervals)]
        for number, k in enumerate(intervals):
            due = (period + 1) % k == 0
            assert used[number] == number if due else intervals[used[number]] == 1
    for number, k in enumerate(intervals):
        assert k == 1 or order.count(number) == periods // k


def test_an_order_without_a_usual_round_is_refused() -> None:
    with pytest.raises(ValueError, match="one of them is 1"):
        order_of([2, 4])


@pytest.mark.parametrize("inner", [one_peer_exponential(8), base_graph(6)])
def test_reordered_rounds_are_the_inner_ones_and_sums_stay(inner: Any) -> None:
    intervals = [1] * inner.period
    intervals[0] = 4
    found = Reordered(inner, [(5, tuple(intervals))])
    assert found.is_doubly_stochastic() and found.period is None and found.name == inner.name
    order = order_of(intervals)
    for t in range(40):
        number = t % inner.period if t < 5 else order[(t - 5) % len(order)]
        np.testing.assert_array_equal(found.matrix(t), inner.matrix(number))
        assert found.round(1, t) == inner.round(1, number)
    assert found != inner and found == Reordered(inner, [(5, tuple(intervals))])


# -- what rounds cost ------------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000), st.floats(0.0, 5.0), st.sampled_from([0.0, 0.5, 1.0, 4.0]), st.floats(0.0, 0.9))
def test_costs_are_those_of_the_rounds_whoever_was_late_before(
    seed: int, one: float, other: float, quick: float
) -> None:
    """Clocks of all ranks, in absolute time, on edges of which a few take longer than the second that a step computes."""
    topology, draw = one_peer_exponential(8), np.random.default_rng(seed)
    takes = draw.uniform(0.0, quick, (3, 8))  # of each round, of each sender
    takes[0, draw.integers(8)] += one
    takes[1, draw.integers(8)] += other
    begun = np.zeros(8)
    rows: list[list[tuple[float, float]]] = [[] for _ in range(8)]
    for t in range(30):
        there = begun.copy()
        for sender in range(8):
            (receiver,) = topology.round(sender, t).send
            end = max(begun[sender], begun[receiver]) + takes[t % 3, sender]
            there[[sender, receiver]] = np.maximum(there[[sender, receiver]], end)
        done = np.maximum(begun + 1.0, there)
        for rank in range(8):
            rows[rank].append((float(done[rank]), float(done[rank] - (begun[rank] + 1.0))))
        begun = done
    peers = [[{i, *topology.round(i, r).send, *topology.round(i, r).recv} for i in range(8)] for r in range(3)]
    found = relative_costs(rows, [t % 3 for t in range(30)], peers)
    steps = list(np.maximum(1.0, takes.max(axis=1)))
    if min(one, other) == 0.0:
        assert [found[number] for number in range(3)] == pytest.approx(steps, rel=1e-9)
    # Where an end of the slow edge has waited for a third rank, a part of it is not seen; never more than there is.
    assert all(1.0 <= found[number] <= step + 1e-9 for number, step in enumerate(steps))


@pytest.mark.parametrize(
    ("cost", "old", "new"),
    [
        *[(1.0, 1, 1), (1.6, 1, 1), (1.7, 1, 2), (3.2, 1, 2), (3.3, 1, 4), (6.4, 1, 4), (6.6, 1, 8), (1e9, 1, 8)],
        *[(1.6, 2, 2), (1.3, 2, 2), (1.2, 2, 1), (1.0, 8, 1), (5.0, 8, 8), (4.8, 8, 4), (None, 4, 4), (None, 1, 1)],
    ],
)
def test_an_interval_changes_where_a_cost_is_clearly_nearer_to_another(cost: float | None, old: int, new: int) -> None:
    assert interval(cost, old) == new


# -- ranks -----------------------------------------------------------------------------------------------------------


class Virtual:
    """Takes the place of `Adaptation.measured`: a step computes for a second, and the edge from rank 0 to 1 takes 4 until 40."""

    def __init__(self) -> None:
        self.over = [0.0] * N

    def __call__(self, adaptation: Adaptation) -> tuple[float, float]:
        t, topology = adaptation._clock.exchanges - 1, adaptation.topology()
        before = list(self.over)
        for i in range(N):
            self.over[i] = max([before[i] + 1.0, *(before[j] for j in topology.round(i, t).recv)])
        if t < 40 and 1 in topology.round(0, t).send:
            self.over[0] = self.over[1] = max(before[0], before[1]) + 4.0
        me = dist.get_rank()
        return self.over[me], self.over[me] - before[me] - 1.0


@contextmanager
def in_virtual_time() -> Iterator[None]:
    virtual = Virtual()
    with mock.patch.object(Adaptation, "measured", lambda self: virtual(self)):
        yield


def problem() -> problems.Quadratics:
    return problems.least_squares(N, D, 2 * D, seed=N)


def optimizer(**keywords: Any) -> tuple[torch.nn.Parameter, Any]:
    x = torch.nn.Parameter(torch.ones(D, dtype=torch.float64))
    return x, fusedfog.SGD([x], lr=RATE, adapt=EVERY, **{"topology": "one_peer_exponential", **keywords})


def train(x: torch.nn.Parameter, opt: Any, steps: int) -> None:
    quadratics, me = problem(), dist.get_rank()
    for _ in range(steps):
        x.grad = torch.from_numpy(np.asarray(quadratics.grad(me, x.detach().numpy())))
        opt.step()


def hop(h: int) -> Any:
    w = np.eye(N) / 2
    for i in range(N):
        w[i, (i - h) % N] += 0.5
    return w


SLOW, ORDER = 17, (1, 1, 1, 1, 1, 1, 0, 1)
"""Exchanges 0 to 7 are told at 8 and read at 16, when 16 is on its way; then hop 1 is used in every fourth period."""

USUAL = 57
"""Exchanges 40 to 47 are the first without a delay."""


def hop_at(t: int) -> Any:
    number = t % 2 if t < SLOW else ORDER[(t - SLOW) % 8] if t < USUAL else (t - USUAL) % 2
    return hop(1 + number)


def oracle(steps: int, atc: bool = False) -> Any:
    quadratics, x = problem(), np.ones((N, D))
    for t in range(steps):
        step = RATE * quadratics.grads(x)
        x = hop_at(t) @ (x - step) if atc else hop_at(t) @ x - step
    return x


def adapted(keywords: dict[str, Any]) -> tuple[Any, list[Any], Any]:
    """Parameters after 70 steps, intervals on the way, and parameters of a run that was resumed at step 30."""
    seen = []
    with in_virtual_time():
        x, opt = optimizer(**keywords)
        for steps in (16, 1, 13):
            train(x, opt, steps)
            seen.append(opt.stats()["intervals"])
        saved, at = copy.deepcopy(opt.state_dict()), x.detach().clone()
        train(x, opt, 40)
        seen.append(opt.stats()["intervals"])
    with in_virtual_time():
        other, again = optimizer(**keywords)
        with again.paused(), torch.no_grad():
            other.copy_(at)
        again.load_state_dict(saved)
        seen.append(again.stats()["intervals"])
        train(other, again, 40)
    opt.set_topology("one_peer_exponential")
    seen.append(opt.stats()["intervals"])
    return x.detach().numpy().copy(), seen, other.detach().numpy().copy()


@pytest.mark.parametrize("algorithm", ["awc", "atc"])
def test_a_slow_edge_carries_less_until_it_recovers_and_all_ranks_agree(ranks: Pool, algorithm: str) -> None:
    found = ranks.run(N, adapted, {"algorithm": algorithm, "fused_backward": algorithm == "atc"})
    x = oracle(70, algorithm == "atc")
    for rank, (own, seen, again) in enumerate(found):
        assert seen == [(4, 1), (4, 1), (4, 1), (1, 1), (4, 1), (1, 1)]
        np.testing.assert_allclose(own, x[rank], rtol=0, atol=1e-10)
        np.testing.assert_array_equal(own, again)


def test_simulated_ranks_follow_the_same_change_in_mid_run() -> None:
    hessians, linear = (torch.from_numpy(np.asarray(part)) for part in (problem().hessians, problem().linear))
    topology = Reordered(one_peer_exponential(N), [(0, (1, 1)), (SLOW, (4, 1)), (USUAL, (1, 1))])
    start = np.ones((N, D))
    run = simulate(Quadratics(hessians, linear), N, topology, "awc", steps=70, lr=RATE, x0=start)
    np.testing.assert_allclose(run.X.numpy(), oracle(70), rtol=0, atol=1e-10)


def slowed() -> tuple[int, ...]:
    """Intervals where rank 1 really waits half a second for each message from rank 0."""
    wait = Mailbox.wait

    def late(self: Mailbox, bucket: Any, **keywords: Any) -> None:
        if dist.get_rank() == 1 and 0 in bucket.sources:
            time.sleep(0.5)
            self.stats.blocked_s += 0.5
        wait(self, bucket, **keywords)

    with mock.patch.object(Mailbox, "wait", late):
        x, opt = optimizer()
        train(x, opt, 2 * EVERY)
    opt.drain()
    return tuple(opt.stats()["intervals"])


def test_an_edge_that_takes_longer_is_noticed_by_the_time_that_ranks_are_blocked(ranks: Pool) -> None:
    found = ranks.run(N, slowed)
    assert found == [found[0]] * N
    rare, usual = found[0]
    assert rare > 1 and usual == 1


def between_two() -> dict[str, Any]:
    x, opt = optimizer()
    train(x, opt, 3 * EVERY)
    stats: dict[str, Any] = opt.stats()
    return stats


def test_between_two_ranks_there_is_nothing_to_choose(ranks: Pool) -> None:
    for stats in ranks.run(2, between_two):
        assert "intervals" not in stats


@pytest.mark.parametrize("adapt", [0, -3, 2.5, True, "often"])
def test_numbers_without_sense_are_refused(adapt: Any) -> None:
    with pytest.raises(ValueError, match="adapt must be a whole number of exchanges"):
        fusedfog.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1, adapt=adapt)


@pytest.mark.parametrize(
    ("algorithm", "graph", "others", "message"),
    [
        ("awc", "ring", {}, "adapt=8 does not work with topology ring: a static graph has no other round; use 'one_peer"),
        ("awc", random_matching(4, seed=0), {}, "topology random_matching: its rounds do not come again"),
        ("extra", None, {}, "adapt=8 does not work with algorithm 'extra'"),
        ("push_sum", None, {}, "adapt=8 does not work with algorithm 'push_sum'"),
        ("awc", "one_peer_exponential", {"wire_dtype": "int8"}, "wire_dtype='int8': compressed messages have replicas for"),
        ("awc", None, {"mesh": "machines"}, "adapt=8 does not work with mesh="),
    ],
)
def test_what_it_does_not_go_with_is_refused(algorithm: str, graph: Any, others: dict[str, Any], message: str) -> None:
    setup = Setup("SGD", TABLE["SGD"][algorithm], {"adapt": 8, **others}, ranks=4)
    with pytest.raises(ValueError, match=message):
        choose_topology(setup, graph, 4)
