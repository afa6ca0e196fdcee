"""The stand-in for NCCL keeps NCCL's rules, and says so where a program breaks them."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from support import ordered_backend
from support.pool import Pool


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    ordered_backend.build()


def _batch(*ops: tuple[str, torch.Tensor, int], tag: int = 0) -> list[dist.Work]:
    kinds = {"send": dist.isend, "recv": dist.irecv}
    return dist.batch_isend_irecv([dist.P2POp(kinds[kind], tensor, peer, tag=tag) for kind, tensor, peer in ops])


def _message(call: Callable[[], object]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "no error"


def _good_programs() -> dict[str, object]:
    ordered_backend.open_world()
    rank, size = dist.get_rank(), dist.get_world_size()
    backend = dist.distributed_c10d._get_default_group()._get_backend(torch.device("cpu"))
    found: dict[str, object] = {"name": backend.name(), "timeout": backend.options._timeout}
    total = torch.full((5,), float(rank))
    dist.all_reduce(total)
    found["sum"] = total.tolist()
    gathered = [torch.empty(1) for _ in range(size)]
    dist.all_gather(gathered, torch.tensor([float(rank)]))
    found["gathered"] = [t.item() for t in gathered]
    word = torch.tensor([float(rank)])
    dist.broadcast(word, 1)
    dist.barrier()
    found["word"] = word.item()
    right, left = (rank + 1) % size, (rank - 1) % size
    # Tags that match nothing: only the order of messages counts. And two to the same peer, and one to oneself.
    out = [torch.full((3,), 10.0 * rank + i) for i in range(3)]
    got = [torch.empty(3) for _ in range(3)]
    works = _batch(("recv", got[0], left), ("recv", got[1], left), ("recv", got[2], rank),
                   ("send", out[0], right), ("send", out[1], right), ("send", out[2], rank), tag=rank)  # fmt: skip
    found["works"] = len(works)
    for _ in range(3):
        works[0].wait()
    found["done"] = works[0].is_completed()
    found["got"] = [t[0].item() for t in got]
    return found


def test_collectives_batches_and_repeated_waits(ranks: Pool) -> None:
    for rank, found in enumerate(ranks.run(3, _good_programs, init=False)):
        left = 10.0 * ((rank - 1) % 3)
        assert found == {
            "name": "nccl",
            "timeout": timedelta(seconds=20),
            "sum": [3.0] * 5,
            "gathered": [0.0, 1.0, 2.0],
            "word": 1.0,
            "works": 1,
            "done": True,
            "got": [left, left + 1, 10.0 * rank + 2],
        }


def _bad_order() -> str:
    ordered_backend.open_world()
    dist.barrier()
    ordered_backend.limit(1.5)
    a, b = torch.zeros(2), torch.zeros(3)
    kind, peer = ("send", 1) if dist.get_rank() == 0 else ("recv", 0)
    first, second = (a, b) if dist.get_rank() == 0 else (b, a)
    works = _batch((kind, first, peer)) + _batch((kind, second, peer))
    return _message(lambda: [work.wait() for work in works])


def _crossed_batches() -> str:
    # Rank 0 sends and then receives, rank 1 too: as two batches each waits for the other, as one batch they pass.
    ordered_backend.open_world()
    dist.barrier()
    ordered_backend.limit(1.5)
    peer = 1 - dist.get_rank()
    works = _batch(("send", torch.zeros(2), peer)) + _batch(("recv", torch.zeros(2), peer))
    return _message(lambda: [work.wait() for work in works])


def _too_many() -> str:
    ordered_backend.open_world()
    dist.barrier()
    rank = dist.get_rank()
    ops = [("send", torch.zeros(1), rank), ("recv", torch.zeros(1), rank)] * 129
    return _message(lambda: _batch(*ops))


def _two_threads() -> str:
    ordered_backend.open_world()
    dist.barrier()
    said: list[str] = []
    thread = threading.Thread(target=lambda: said.append(_message(dist.barrier)))
    thread.start()
    thread.join()
    return said[0]


def _first_of_some() -> str:
    ordered_backend.open_world()
    group = dist.new_group([0, 1, 2])
    ordered_backend.limit(1.5, group)
    if dist.get_rank() == 2:
        time.sleep(2.0)
        return "not called"
    peer = 1 - dist.get_rank()
    ops = [dist.P2POp(dist.irecv, torch.empty(1), peer, group), dist.P2POp(dist.isend, torch.zeros(1), peer, group)]
    return _message(lambda: dist.batch_isend_irecv(ops)[0].wait())


def _to_nobody() -> str:
    ordered_backend.open_world()
    return _message(lambda: _batch(("send", torch.zeros(1), dist.get_rank())))


@pytest.mark.parametrize(
    ("program", "size", "says", "one_says"),
    [
        # The first whose time is over closes its connections, and that may be what the other hears first.
        (_bad_order, 2, "message 0, .* (timed out|connection lost)", "timed out"),
        (_crossed_batches, 2, "sending to rank . .* (timed out|connection lost)", "timed out"),
        (_too_many, 1, "258 operations in one batch", ""),
        (_two_threads, 1, "from two threads", ""),
        # Of two, one may come when the other's time is over.
        (_first_of_some, 3, "first operation .* only [12] of 3 have come", "only 2 of 3"),
        (_to_nobody, 1, "to oneself .* hang", ""),
    ],
)
def test_what_hangs_on_nccl_is_an_error_here(
    ranks: Pool, program: Callable[[], str], size: int, says: str, one_says: str
) -> None:
    said = ranks.run(size, program, init=False)
    for text in said[:2]:
        assert re.search(says, text), said
    assert any(one_says in text for text in said[:2]), said


def _split(use_local_synchronization: bool, bound: bool) -> str:
    ordered_backend.open_world(bound=bound)
    if use_local_synchronization and bound:  # The others would be waited for.
        ordered_backend.limit(1.5)
    members = [0, 1]
    if use_local_synchronization and dist.get_rank() not in members:
        time.sleep(2.0 if bound else 0.0)
        return "not called"
    said: list[object] = []

    def make() -> None:
        group = dist.new_group(members, use_local_synchronization=use_local_synchronization)
        if dist.get_rank() in members:
            total = torch.ones(1)
            dist.all_reduce(total, group=group)
            said.append(total.item())

    return _message(make) if not said else str(said)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("local", [False, True])
def test_a_bound_world_splits_with_all_of_its_ranks(ranks: Pool, local: bool, bound: bool) -> None:
    said = ranks.run(3, _split, local, bound, init=False)
    if local and bound:
        assert all(re.search(r"a communicator is split.* only [12] of 3", text) for text in said[:2]), said
        # The one whose time is over last has seen the other come.
        assert any("only 2 of 3" in text for text in said[:2]), said
    else:
        assert said[:2] == ["no error"] * 2


def _aborted() -> tuple[list[bool], str, float]:
    ordered_backend.open_world()
    dist.barrier()
    if dist.get_rank():
        dist.distributed_c10d._get_default_store().wait(["aborted"])
        return [], "", 0.0
    came = torch.zeros(3)
    work = _batch(("recv", came, 1))[0]
    time.sleep(0.2)
    found = [work.is_completed()]
    dist.distributed_c10d._get_default_group()._get_backend(torch.device("cuda")).abort()
    found.append(work.is_completed())
    text = _message(work.wait)
    dist.distributed_c10d._get_default_store().set("aborted", "")
    return found, text, came[0].item()


def test_what_is_aborted_counts_as_complete_and_brings_garbage(ranks: Pool) -> None:
    found, text, value = ranks.run(2, _aborted, init=False)[0]
    assert found == [False, True] and text == "no error"
    assert value != value, "NaN"
