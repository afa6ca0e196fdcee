"""`fusedfog.Window` between real ranks: what put, get, accumulate, update and collect do, by shared memory and by TCP."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from support.waits import await_said, say
from support.windows import TRANSPORTS, held_by_process, settle, transport

import fusedfog
from fusedfog.topology import exponential, ring

N = 3


def mixed_once(how: str) -> tuple[Any, ...]:
    rank = dist.get_rank()
    x = torch.arange(6, dtype=torch.float64).view(2, 3) + 10 * rank
    with transport(how), fusedfog.Window(x, "ring") as window:
        couriers = sum(link.courier is not None for link in window._endpoint.links())
        before, begin = (
            dict(window.versions),
            window.update(0.0, {(rank + 1) % N: 1.0}, out=torch.empty_like(x)).clone(),
        )
        dist.barrier()
        window.put()
        window.put(weights=[(rank + 1) % N], self_weight=1.0)
        settle(window)
        versions, alive = dict(window.versions), window.alive
        dist.barrier()
        result = window.update()
        assert result.data_ptr() == x.data_ptr()
        return couriers, before, begin, versions, x.clone(), dict(window.versions), window.p, alive


@pytest.mark.parametrize("how", TRANSPORTS)
def test_put_and_update_are_a_round_of_the_topology(ranks: Pool, how: str) -> None:
    W = ring(N).matrix()
    given = np.stack([np.arange(6.0).reshape(2, 3) + 10 * rank for rank in range(N)])
    expected = np.einsum("ij,jab->iab", W, given)
    for rank, found in enumerate(ranks.run(N, mixed_once, how)):
        couriers, before, begin, versions, x, after, p, alive = found
        assert couriers == (0 if how == "memory" else 4)
        peers = sorted({(rank - 1) % N, (rank + 1) % N})
        assert before == dict.fromkeys(peers, 0)
        # An inbox begins with the receiver's own value.
        assert torch.equal(begin, torch.from_numpy(given[rank]))
        assert versions == {(rank - 1) % N: 2, (rank + 1) % N: 1}
        np.testing.assert_allclose(x.numpy(), expected[rank], rtol=1e-14)
        assert after == dict.fromkeys(peers, 0)
        assert p == pytest.approx(1.0) and alive == dict.fromkeys(peers, True)


def any_numbers(how: str, seed: int, zero_init: bool) -> tuple[Any, ...]:
    """Random calls, the same list on all ranks and one call at a time, so that the outcome is certain."""
    rank, size = dist.get_rank(), dist.get_world_size()
    random = np.random.default_rng(seed)
    x = torch.tensor([1.0 + rank, -2.0 * rank], dtype=torch.float64)
    with transport(how), fusedfog.Window(x, exponential(size), zero_init=zero_init) as window:
        for _ in range(25):
            who, what = (
                int(random.integers(size)),
                str(random.choice(["put", "accumulate", "get", "update", "collect"])),
            )
            out, into = sorted(window._endpoint.out), sorted(window._endpoint.into)
            weights, share = random.normal(size=(size, 2)), float(random.normal())
            if who == rank:
                chosen = {peer: float(weights[peer, 0]) for peer in out if weights[peer, 1] > -0.5}
                heard = {peer: float(weights[peer, 0]) for peer in into if weights[peer, 1] > -0.5}
                if what in ("put", "accumulate"):
                    getattr(window, what)(None, chosen, share)
                elif what == "get":
                    window.get(heard)
                elif what == "update":
                    window.update(share, heard, reset=bool(weights[0, 0] > 0))
                else:
                    window.collect()
            settle(window)
        return x.tolist(), window.p, window.versions


def oracle(seed: int, size: int, zero_init: bool) -> list[tuple[list[float], float, dict[int, int]]]:
    """The same calls on an array, by BlueFog's definitions."""
    random = np.random.default_rng(seed)
    graph = exponential(size)
    x = np.array([[1.0 + rank, -2.0 * rank, 1.0] for rank in range(size)])  # The last column is p.
    inbox = np.repeat(x[:, None], size, 1) * (not zero_init)
    version = np.zeros((size, size), int)
    for _ in range(25):
        who, what = int(random.integers(size)), str(random.choice(["put", "accumulate", "get", "update", "collect"]))
        out, into = sorted(graph.round(who).send), sorted(graph.round(who).recv)
        weights, share = random.normal(size=(size, 2)), float(random.normal())
        chosen, heard = ([peer for peer in peers if weights[peer, 1] > -0.5] for peers in (out, into))
        if what in ("put", "accumulate"):
            for peer in chosen:
                inbox[peer, who] = weights[peer, 0] * x[who] + (inbox[peer, who] if what == "accumulate" else 0)
                version[peer, who] += what == "put"
            x[who] *= share
        elif what == "get":
            for peer in heard:
                inbox[who, peer] = weights[peer, 0] * x[peer]
                version[who, peer] += 1
        else:
            if what == "update":
                x[who] = share * x[who] + sum(weights[peer, 0] * inbox[who, peer] for peer in heard)
            else:
                x[who] += sum(inbox[who, peer] for peer in into)
            if what == "collect" or weights[0, 0] > 0:
                inbox[who, heard if what == "update" else into] = 0
            version[who] = 0
    return [
        (x[rank, :2].tolist(), x[rank, 2], {peer: int(version[rank, peer]) for peer in sorted(graph.round(rank).recv)})
        for rank in range(size)
    ]


@pytest.mark.parametrize(("how", "seed", "zero_init"), [("memory", 1, False), ("tcp", 2, True), ("memory", 3, True)])
def test_any_calls_are_bluefog_s_definitions(ranks: Pool, how: str, seed: int, zero_init: bool) -> None:
    for found, expected in zip(
        ranks.run(4, any_numbers, how, seed, zero_init), oracle(seed, 4, zero_init), strict=True
    ):
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-10)
        assert found[1] == pytest.approx(expected[1], rel=1e-10) and found[2] == expected[2]


DTYPES = [torch.bfloat16, torch.float16, torch.complex64, torch.int8, torch.int64, torch.float32]


def kinds(how: str) -> list[Any]:
    found: list[Any] = []
    with transport(how):
        for dtype in DTYPES:
            x = torch.full((7,), dist.get_rank() + 2, dtype=dtype).t()
            with fusedfog.Window(x, [(0, 1), (1, 0)], name=str(dtype)) as window:
                window.put()
                settle(window)
                window.accumulate(weights=[1 - dist.get_rank()], self_weight=2)
                settle(window)
                window.collect()
                found.append(x.tolist())
                dist.barrier()
    scalar, empty = torch.tensor(float(dist.get_rank())), torch.empty(0, 3)
    strided = torch.arange(12.0).view(3, 4).t()[::2] + dist.get_rank()
    for one in (scalar, empty, strided):
        with fusedfog.Window(one, "ring") as window:
            window.put()
            settle(window)
            found.append(window.update().clone())
            dist.barrier()
    return found


@pytest.mark.parametrize("how", TRANSPORTS)
def test_dtypes_and_shapes(ranks: Pool, how: str) -> None:
    for rank, found in enumerate(ranks.run(2, kinds, how)):
        # Own times 2, and the other's once by put and once by accumulate.
        assert all(values == [2 * (rank + 2) + 2 * (1 - rank + 2)] * 7 for values in found[: len(DTYPES)])
        assert found[-3].item() == 0.5 and found[-2].shape == (0, 3)
        assert torch.equal(found[-1], torch.arange(12.0).view(3, 4).t()[::2] + 0.5)


def got_while_owner_sleeps(how: str) -> tuple[list[float], int]:
    rank = dist.get_rank()
    x = torch.full((3,), float(rank))
    with transport(how), fusedfog.Window(x, [(1, 0)], zero_init=True) as window:
        dist.barrier()
        if rank == 1:
            with torch.no_grad():
                x.fill_(7.0)
            dist.barrier()
            await_said("got")  # Its program calls nothing.
        else:
            dist.barrier()
            window.get({1: 0.5})
            say("got")
            versions = window.versions[1]
            window.update(0.0, {1: 1.0})
            assert window.p == 0.5
            return x.tolist(), versions
        return [], 0


@pytest.mark.parametrize("how", TRANSPORTS)
def test_get_fetches_what_the_owner_has_now_whatever_it_does(ranks: Pool, how: str) -> None:
    assert ranks.run(2, got_while_owner_sleeps, how)[0] == ([3.5] * 3, 1)


def all_get_from_all(how: str) -> list[float]:
    x = torch.tensor([float(dist.get_rank())])
    with transport(how), fusedfog.Window(x, "fully_connected") as window:
        dist.barrier()
        for _ in range(20):
            window.get()
        dist.barrier()
        return window.update().tolist()


@pytest.mark.parametrize("how", TRANSPORTS)
def test_ranks_that_get_from_each_other_do_not_wait_in_a_circle(ranks: Pool, how: str) -> None:
    assert ranks.run(4, all_get_from_all, how) == [[1.5]] * 4


def many_at_once(how: str) -> list[list[float]]:
    rank = dist.get_rank()
    with transport(how):
        windows = [fusedfog.Window(torch.full((4,), float(rank + k)), "ring", name=str(k)) for k in range(4)]
    for window in windows:
        window.put()
    for window in windows:
        settle(window)
    found = [window.update().round(decimals=5).tolist() for window in windows]
    dist.barrier()
    # In another order on each rank, and with messages in flight.
    for k in range(4):
        windows[(k + rank) % 4].put()
        windows[(k + rank) % 4].close()
        windows[(k + rank) % 4].close()
    return found


@pytest.mark.parametrize("how", TRANSPORTS)
def test_several_windows_are_closed_in_any_order(ranks: Pool, how: str) -> None:
    assert ranks.run(3, many_at_once, how) == [[[1.0 + k] * 4 for k in range(4)]] * 3


def held_and_let_go(how: str) -> list[tuple[int, int]]:
    found = []
    with transport(how):
        for _ in range(3):
            with fusedfog.Window(torch.zeros(1000), "fully_connected") as window:
                window.put()
                settle(window)
                window.get()
                dist.barrier()
            found.append(held_by_process())
        dropped = fusedfog.Window(torch.zeros(10), "ring")
        del dropped
        found.append(held_by_process())
    return found


@pytest.mark.parametrize("how", TRANSPORTS)
def test_a_closed_or_dropped_window_leaves_no_descriptor_and_no_thread(ranks: Pool, how: str) -> None:
    for found in ranks.run(3, held_and_let_go, how):
        assert len(set(found)) == 1, found


def from_threads() -> tuple[float, float]:
    rank = dist.get_rank()
    x = torch.ones(1000, dtype=torch.float64)
    with fusedfog.Window(x, [(0, 1)], zero_init=True) as window:
        dist.barrier()
        if rank == 0:

            def add() -> None:
                for _ in range(50):
                    window.accumulate()

            threads = [threading.Thread(target=add) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            window.fence(20)
        dist.barrier()
        window.collect()
        return x.min().item(), x.max().item()


def test_any_thread_may_send(ranks: Pool) -> None:
    assert ranks.run(2, from_threads) == [(1.0, 1.0), (201.0, 201.0)]


def put_from_threads(how: str) -> tuple[int, float]:
    """Threads put i, i, ..., i, while the program mixes and gets in the same window."""
    rank, size, torn = dist.get_rank(), dist.get_world_size(), 0
    x = torch.zeros(1000, dtype=torch.float64)
    with transport(how), fusedfog.Window(x, "fully_connected") as window:
        dist.barrier()

        def put(first: int) -> None:
            for number in range(first, first + 50):
                window.put(torch.full_like(x, float(number)))

        threads = [threading.Thread(target=put, args=(first,)) for first in (1, 1001)]
        for thread in threads:
            thread.start()
        for _ in range(50):
            got = window.update(0.0, {(rank + 1) % size: 1.0}, out=torch.empty_like(x))
            torn += int(got.min() != got.max())
            window.get([(rank + 2) % size])
        for thread in threads:
            thread.join()
        settle(window)
        last = window.update(0.0, {(rank + 1) % size: 1.0}, out=torch.empty_like(x))[0].item()
        dist.barrier()
        return torn, last


@pytest.mark.parametrize("how", TRANSPORTS)
def test_any_thread_may_put_while_another_mixes(ranks: Pool, how: str) -> None:
    for torn, last in ranks.run(3, put_from_threads, how):
        assert torn == 0 and last in (50.0, 1050.0)


def handles(how: str) -> bool:
    with transport(how), fusedfog.Window(torch.ones(3), [(0, 1)]) as window:
        if dist.get_rank() == 0:
            sent = window.put(async_op=True)
            sent.wait(20)
            assert sent.is_completed()
        dist.barrier()
        return window.versions == ({} if dist.get_rank() == 0 else {0: 1})


@pytest.mark.parametrize("how", TRANSPORTS)
def test_a_handle_says_when_a_put_has_arrived(ranks: Pool, how: str) -> None:
    assert ranks.run(2, handles, how) == [True, True]


def without_group_or_store() -> list[float]:
    group = fusedfog.new_group([0, 1]) if dist.get_rank() < 2 else fusedfog.new_group([2, 3])
    x = torch.tensor([float(dist.get_rank())])
    window = fusedfog.Window(x, "ring", group=group)
    dist.barrier()
    dist.destroy_process_group()
    window.put()
    window.fence(20)
    peer = 1 - dist.get_rank() % 2 if dist.is_initialized() else None
    assert peer is None
    deadline = time.monotonic() + 20
    while not all(window.versions.values()) and time.monotonic() < deadline:
        time.sleep(0.01)
    found = window.update().tolist()
    window.fence(20)
    time.sleep(0.2)
    window.close()
    return found


def test_a_window_of_a_group_needs_neither_group_nor_store_afterwards(ranks: Pool) -> None:
    assert ranks.run(4, without_group_or_store) == [[0.5], [0.5], [2.5], [2.5]]


def push_sum() -> tuple[list[float], float, float]:
    """A column-stochastic digraph of four ranks with unequal degrees; weights as each sender knows them."""
    rank = dist.get_rank()
    edges = [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2), (2, 0)]
    out = [receiver for sender, receiver in edges if sender == rank]
    share = 1 / (len(out) + 1)
    x = torch.tensor([float(rank), 10.0 * rank**2], dtype=torch.float64)
    with fusedfog.Window(x, edges, zero_init=True) as window:
        for step in range(150):
            window.accumulate(weights=dict.fromkeys(out, share), self_weight=share)
            if (step + rank) % 3 == 0:
                window.collect()
            if step % 5 == 4:
                dist.barrier()  # On a busy machine one rank may be through before another begins.
        settle(window)
        window.collect()
        return (x / window.p).tolist(), window.p, float(x[0])


def test_push_sum_by_accumulate_keeps_the_mass_and_finds_the_mean(ranks: Pool) -> None:
    found = ranks.run(4, push_sum)
    assert sum(p for _, p, _ in found) == pytest.approx(4.0, abs=1e-12)
    assert sum(first for _, _, first in found) == pytest.approx(6.0, abs=1e-11)
    for estimate, _, _ in found:
        assert estimate == pytest.approx([1.5, 35.0], rel=1e-6)


def alone() -> tuple[list[float], dict[int, bool]]:
    with fusedfog.Window(torch.tensor([3.0]), "ring") as window:
        window.put()
        window.accumulate()
        window.get()
        window.fence()
        with window.mutex():
            window.collect()
        return window.update().tolist(), window.alive


def test_alone_a_window_is_the_own_tensor(ranks: Pool) -> None:
    assert ranks.run(1, alone, init=False) == [([3.0], {})]
    assert ranks.run(1, alone) == [([3.0], {})]
