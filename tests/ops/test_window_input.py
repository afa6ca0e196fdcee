"""What a window refuses, before anything is sent or changed; and what it does not survive: `close`, and a fork."""

from __future__ import annotations

import os
import resource
import socket
import time
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from support.waits import await_true, shorten
from support.windows import TRANSPORTS, transport

import fusedfog
from fusedfog.comm.store import own_store
from fusedfog.comm.window import memory, opening
from fusedfog.topology import fully_connected

ONE = torch.zeros(3)


def said(function: Any, *args: Any, **keywords: Any) -> str:
    try:
        function(*args, **keywords)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def build_wrongly() -> dict[str, str]:
    rank = dist.get_rank()
    return {
        "changes": said(fusedfog.Window, ONE, "one_peer_exponential"),
        "size": said(fusedfog.Window, ONE, fully_connected(5)),
        "name": said(fusedfog.Window, ONE, "rign"),
        "kind": said(fusedfog.Window, ONE, 7),
        "pair": said(fusedfog.Window, ONE, [(0, 1, 2)]),
        "rank": said(fusedfog.Window, ONE, [(0, 9)]),
        "self": said(fusedfog.Window, ONE, [(1, 1)]),
        "twice": said(fusedfog.Window, ONE, [(0, 1), (0, 1)]),
        "list": said(fusedfog.Window, [1.0], "ring"),
        "bool": said(fusedfog.Window, torch.zeros(3, dtype=torch.bool), "ring"),
        "sparse": said(fusedfog.Window, torch.zeros(3).to_sparse(), "ring"),
        "shapes": said(fusedfog.Window, torch.zeros(3 + (rank == 1)), "ring"),
        "dtypes": said(fusedfog.Window, torch.zeros(3, dtype=(torch.float32, torch.float64)[rank == 2]), "ring"),
        "edges": said(fusedfog.Window, ONE, [(0, 1)] if rank else [(1, 0)]),
        "names": said(fusedfog.Window, ONE, "ring", name=f"w{rank}"),
        "one": said(fusedfog.Window, ONE.bool() if rank == 1 else ONE, "ring"),
    }


def test_every_mistake_is_told_to_all_ranks_and_none_waits(ranks: Pool) -> None:
    zero, one, _ = ranks.run(3, build_wrongly)
    assert "ValueError" in zero["changes"] and "use a static topology" in zero["changes"]
    assert "has 5 ranks but the group has 3" in zero["size"]
    assert "did you mean 'ring'" in zero["name"]
    assert zero["kind"].startswith("TypeError: topology must be") and "pairs (sender, receiver)" in zero["kind"]
    assert zero["pair"].startswith("TypeError") and "(0, 1, 2)" in zero["pair"]
    assert "there is no rank 9" in zero["rank"]
    assert "rank 1 has no edge to itself" in zero["self"]
    assert "(0, 1) is there twice" in zero["twice"]
    assert zero["list"].startswith("TypeError") and zero["sparse"].startswith("TypeError")
    assert zero["bool"].startswith("TypeError") and "convert it" in zero["bool"]
    assert zero["shapes"].startswith("MismatchError: rank 0: Window:")
    assert "shape (4,) on rank 1" in zero["shapes"] and "shape (3,) on rank 0" in zero["shapes"]
    assert "float64 tensor of shape (3,) on rank 2" in zero["dtypes"]
    assert "topology is 1 pairs" in zero["edges"] and "on rank 1" in zero["edges"]
    assert "name is 'w1' on rank 1 but 'w0' on rank 0" in zero["names"]
    assert zero["one"].startswith("MismatchError") and "rank 1 has bad arguments" in zero["one"]
    assert one["one"].startswith("TypeError")


def use_wrongly() -> tuple[dict[str, str], bool]:
    rank = dist.get_rank()
    x = torch.full((3,), float(rank))
    with fusedfog.Window(x, [(0, 1), (1, 2), (2, 0)]) as window:
        dist.barrier()
        found = {
            "stranger": said(window.put, weights={(rank + 2) % 3: 1.0}),
            "self": said(window.put, weights={rank: 1.0}),
            "none": said(window.accumulate, weights={7: 1.0}),
            "nan": said(window.put, weights={(rank + 1) % 3: float("nan")}),
            "shape": said(window.put, torch.zeros(4)),
            "dtype": said(window.accumulate, torch.zeros(3, dtype=torch.float64)),
            "get": said(window.get, {(rank + 1) % 3: 1.0}),
            "half": said(window.update, self_weight=1.0),
            "recv": said(window.update, 0.5, {(rank + 1) % 3: 1.0}),
            "out": said(window.update, out=torch.zeros(2)),
            "mutex": said(window.mutex([(rank + 2) % 3]).__enter__),
        }
        dist.barrier()
        unchanged = x.tolist() == [float(rank)] * 3 and not any(window.versions.values()) and window.p == 1
    with fusedfog.Window(torch.zeros(3, dtype=torch.int64), "ring") as window:
        found["integers"] = said(window.update)
        found["half put"] = said(window.put, self_weight=0.5)
        dist.barrier()
    names = ("put", "accumulate", "get", "update", "collect", "fence")
    found |= {f"closed {name}": said(getattr(window, name)) for name in names}
    found["closed versions"] = said(lambda: window.versions)
    found["closed alive"] = said(lambda: window.alive)
    found["closed mutex"] = said(window.mutex().__enter__)
    found["closed with"] = said(window.__enter__)
    return found, unchanged


def test_wrong_calls_change_nothing(ranks: Pool) -> None:
    for rank, (found, unchanged) in enumerate(ranks.run(3, use_wrongly)):
        assert unchanged
        assert found["stranger"] == (
            f"ValueError: weights names rank {(rank + 2) % 3}, but in this window rank {rank} sends to [{(rank + 1) % 3}] only"
        )
        assert "its own share is self_weight" in found["self"]
        assert "there is no rank 7" in found["none"] and "must be finite" in found["nan"]
        assert "shape (4,)" in found["shape"] and "the window's tensor is a float32" in found["shape"]
        assert "float64" in found["dtype"] and "shape (2,)" in found["out"]
        assert f"receives from [{(rank + 2) % 3}] only" in found["get"]
        assert f"receives from [{(rank + 2) % 3}] only" in found["recv"]
        assert f"sends to [{(rank + 1) % 3}] only" in found["mutex"]
        assert "self_weight was given without recv_weights" in found["half"]
        assert found["integers"].startswith("TypeError") and "collect()" in found["integers"]
        assert found["half put"].startswith("TypeError: self_weight is 0.5")
        for name, text in found.items():
            if name.startswith("closed"):
                assert text == f"RuntimeError: rank {rank}: Window: the window is closed", name


def forked(how: str) -> tuple[str, bool, list[float]]:
    """The child's end of the story comes through a pipe."""
    rank = dist.get_rank()
    x = torch.full((2,), float(rank))
    with transport(how), fusedfog.Window(x, "ring") as window:
        before = set(os.listdir("/proc/self/fd"))
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            left = len(set(os.listdir("/proc/self/fd")) & before)
            text = said(window.put)
            window.close()
            os.write(writing, f"{len(before) - left}|{text}".encode())
            os._exit(0)
        os.close(writing)
        closed, _, text = os.read(reading, 10000).decode().partition("|")
        os.close(reading)
        os.waitpid(child, 0)
        # The parent's window is what it was.
        dist.barrier()
        window.put()
        window.fence(20)
        dist.barrier()
        window.get()
        dist.barrier()
        return text, int(closed) >= 6, window.update().tolist()


@pytest.mark.parametrize("how", TRANSPORTS)
def test_a_forked_child_has_no_part_in_it_and_holds_no_descriptor(ranks: Pool, how: str) -> None:
    for rank, (text, closed, values) in enumerate(ranks.run(2, forked, how)):
        assert text.startswith(f"RuntimeError: rank {rank}: Window: this process was forked")
        assert closed and values == [0.5, 0.5]


def with_a_loader() -> tuple[str, list[float]]:
    """A DataLoader's worker, forked while the window is there, is alive until its iterator goes."""
    rank = dist.get_rank()
    x = torch.full((2,), float(rank))
    with fusedfog.Window(x, "ring") as window:

        class Data(torch.utils.data.Dataset[str]):
            def __len__(self) -> int:
                return 1

            def __getitem__(self, place: int) -> str:
                return said(window.put)

        loader = torch.utils.data.DataLoader(
            Data(), batch_size=None, num_workers=1, multiprocessing_context="fork", persistent_workers=True
        )
        (text,) = list(loader)
        dist.barrier()
        window.put()
        window.fence(20)
        dist.barrier()
        return text, window.update().tolist()


def test_a_data_loader_s_workers_have_no_part_in_it(ranks: Pool) -> None:
    for rank, (text, values) in enumerate(ranks.run(2, with_a_loader)):
        assert text.startswith(f"RuntimeError: rank {rank}: Window: this process was forked")
        assert values == [0.5, 0.5]


def too_little_memory(how: str, edges: list[tuple[int, int]]) -> str:
    original = memory._available
    if dist.get_rank() == 1:
        memory._available = lambda: 1000.0
    try:
        with transport(how):
            return said(fusedfog.Window, torch.zeros(1000), edges)
    finally:
        memory._available = original


@pytest.mark.parametrize("edges", [[(0, 1), (1, 2)], [(1, 0), (1, 2)]])  # As receiver; as sender alone, over TCP.
def test_too_little_memory_on_one_rank_is_told_to_all_at_once(ranks: Pool, edges: list[tuple[int, int]]) -> None:
    # Within the call's 60 seconds, of which nobody waits for a part of 10 minutes.
    for rank, text in enumerate(ranks.run(3, too_little_memory, "tcp", edges, pg_timeout=600)):
        assert text.startswith(f"ExchangeError: rank {rank}: Window: ")
        assert "rank 1: a window needs 0 MiB for one edge, and 0 MiB are available here" in text


TIMEOUT = 30.0


def unreachable(where: str) -> str:
    """Rank 1 says that it listens where nobody does, or nobody answers."""
    original = opening._Opening._prepare

    def elsewhere(self: Any, address: str) -> dict[str, Any]:
        told = original(self, address)
        if self.view.rank == 1:
            told |= {"ip": "127.0.0.1", "port": 1} if where == "refused" else {"ip": "192.0.2.1"}
        return told

    connect = socket.create_connection

    def impatiently(there: Any, timeout: float) -> socket.socket:
        """What comes to nothing does so soon, and yet the ranks may be late by seconds."""
        assert timeout <= opening._SHARE_OF_TIMEOUT * TIMEOUT
        return connect(there, min(timeout, 1.0))

    begin = time.monotonic()
    with (
        mock.patch.object(opening._Opening, "_prepare", elsewhere),
        mock.patch.object(socket, "create_connection", impatiently),
    ):
        return f"{said(fusedfog.Window, ONE, [(0, 1), (1, 2)])} {time.monotonic() - begin < 10}"


@pytest.mark.parametrize("where", ["refused", "silent"])
def test_ranks_that_cannot_reach_each_other_are_named_with_the_address(ranks: Pool, where: str) -> None:
    for rank, text in enumerate(ranks.run(3, unreachable, where, pg_timeout=TIMEOUT)):
        assert f"Error: rank {rank}: Window: " in text or f"PeerTimeout: rank {rank}: Window: " in text
        address = "127.0.0.1:1" if where == "refused" else "192.0.2.1:"
        assert f"rank 0 cannot reach rank 1 at {address}" in text or f"rank 0 did not reach rank 1 at {address}" in text
        assert text.endswith("True")


def too_many() -> str:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 18, hard))
    try:
        return said(fusedfog.Window, ONE, "fully_connected")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_edges_than_descriptors_are_refused_before_any_is_made(ranks: Pool) -> None:
    found = ranks.run(3, too_many)
    assert found[1].startswith("ValueError: a window with 4 edges at this rank needs up to 32 descriptors")
    assert "ulimit -n" in found[1]
    assert found[0].startswith("MismatchError") and "rank 1 has bad arguments" in found[0]


def late() -> str:
    if dist.get_rank() == 1:
        return ""
    if dist.get_rank() == 0:
        # Rank 0 says who has not come: it begins to wait when rank 2 has.
        await_true(lambda: own_store().check(["fusedfog/0-1-2/0/2"]))
        shorten(2.0)
    return said(fusedfog.Window, ONE, "ring")


def test_a_rank_that_does_not_come_is_named(ranks: Pool) -> None:
    assert "PeerTimeout: rank 0: Window: rank 1 did not come within" in ranks.run(3, late)[0]


def elsewhere() -> str:
    if dist.get_rank() == 1:
        return said(fusedfog.mean, 1.0)
    return said(fusedfog.Window, ONE, "ring")


def test_ranks_in_another_call_are_told(ranks: Pool) -> None:
    assert "rank 0 is in Window(), rank 1 is in mean()" in ranks.run(2, elsewhere)[0]
