"""Sums and shards through the memory of one host: equal to float64's, alike on all ranks, and no rank that ends is waited for."""

from __future__ import annotations

import gc
import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from support.pool import Pool, fail_at
from support.waits import await_said, meet, say, shorten
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fusedfog
from fusedfog.comm import shared_memory, shared_reduce
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.group import find_group
from fusedfog.comm.registry import communicator_for
from fusedfog.comm.shared_buffers import Buffer, SharedBuffers
from fusedfog.comm.shared_reduce import SharedTransfer, add_up, hand_round

CPU = torch.device("cpu")


def opened() -> tuple[Communicator, SharedBuffers]:
    communicator = communicator_for(find_group(), CPU)
    shared = communicator.shared_buffers()
    assert shared is not None and communicator.shared_buffers() is shared
    return communicator, shared


def values(rank: int, numel: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(rank), dtype=torch.float64).to(dtype)


def summed(communicator: Communicator, buffer: Buffer, numel: int, dtype: torch.dtype) -> Tensor:
    flat = buffer.room(numel, dtype).copy_(values(dist.get_rank(), numel, dtype))
    SharedTransfer(communicator, "sum", add_up(buffer, numel, dtype)).wait()
    return flat.clone()


LENGTHS = (1, 2, 3, 1000, 3 * (1 << 15) + 5)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def sums() -> list[Tensor]:
    communicator, shared = opened()
    buffer = shared.buffer()
    found = [summed(communicator, buffer, numel, dtype) for dtype in DTYPES for numel in LENGTHS]
    again = [summed(communicator, buffer, numel, dtype) for dtype in DTYPES for numel in LENGTHS]
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return found


@pytest.mark.parametrize("n", [2, 3, 4])
def test_sums_are_those_of_float64_and_the_same_bits_everywhere(ranks: Pool, n: int) -> None:
    first, *others = ranks.run(n, sums)
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    cases = [(dtype, numel) for dtype in DTYPES for numel in LENGTHS]
    for (dtype, numel), found in zip(cases, first, strict=True):
        parts = np.stack([values(rank, numel, dtype).double().numpy() for rank in range(n)])
        # 16-bit values are added in float32 and rounded once.
        error = torch.finfo(dtype).eps * (0.51 if dtype.itemsize == 2 else n)
        np.testing.assert_array_less(
            np.abs(found.double().numpy() - parts.sum(0)), error * np.abs(parts).sum(0) + 1e-300
        )


def slow_copy(source: Tensor, target: Tensor) -> None:
    time.sleep(0.005)
    target.copy_(source)


def many_at_once() -> bool:
    """Operations of all kinds under way together, that ranks come to at different times; rank 0 reads late."""
    communicator, shared = opened()
    kept = shared_reduce._copy
    shared_reduce._copy = slow_copy if dist.get_rank() == 0 else kept
    try:
        _many_at_once(communicator, shared)
    finally:
        shared_reduce._copy = kept
    return True


def _many_at_once(communicator: Communicator, shared: SharedBuffers) -> None:
    buffers, (rank, n) = [shared.buffer() for _ in range(12)], (dist.get_rank(), dist.get_world_size())
    for step in range(8):
        begun = []
        for place, buffer in enumerate(buffers):
            time.sleep(0.002 * ((step + place) % n == rank))
            numel = 100 + place
            own = buffer.room(numel, torch.float32).fill_(step + place + rank)
            if place % 2:
                operation = add_up(buffer, numel, torch.float32)
                found = {rank: own}
                expected = dict.fromkeys(found, float(n * (step + place) + n * (n - 1) // 2))
            else:
                found = {other: torch.empty(numel) for other in shared.others}
                operation = hand_round(buffer, {other: place.split(30) for other, place in found.items()})
                expected = {other: float(step + place + other) for other in shared.others}
            begun.append((SharedTransfer(communicator, "", operation), own, found, expected))
        for transfer, own, found, expected in begun:
            transfer.wait()
            assert transfer.done() and all(bool((found[key] == expected[key]).all()) for key in found)
            own.fill_(torch.nan)  # It is this rank's own again.


def test_operations_may_be_under_way_together_and_buffers_are_free_when_they_end(ranks: Pool) -> None:
    assert all(ranks.run(3, many_at_once))


# -- ranks that end ---------------------------------------------------------------------------------------------------


def train(failure: Any, keywords: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    if "inside" in keywords:
        keywords["mesh"] = init_device_mesh("cpu", (1, dist.get_world_size()))
    opt = fusedfog.SGD(model.parameters(), lr=0.01, bucket_mb=1e-4, **keywords)
    for step in range(50):
        failure.check(step)
        opt.zero_grad()
        model(torch.ones(2, 8)).sum().backward()
        opt.step()


WAYS = [{"algorithm": "allreduce"}, {"inside": "gradients"}, {"inside": "parameters"}]


@pytest.mark.parametrize("keywords", WAYS, ids=str)
def test_a_killed_rank_is_named_at_once(ranks: Pool, keywords: dict[str, Any]) -> None:
    outcomes = ranks.outcomes(3, train, fail_at(1, 5, "kill"), keywords, pg_timeout=60)
    for rank in (0, 2):
        assert outcomes[rank].error_type == "ExchangeError" and outcomes[rank].seconds < 30
        # Whoever notices first tells the other.
        assert "rank 1: connection lost" in outcomes[rank].message or "rank 1 has ended" in outcomes[rank].message


def too_late(late: int) -> float:
    communicator, shared = opened()
    buffer = shared.buffer()
    meet("opened")
    shorten(2.0)
    if dist.get_rank() != late:
        begin = time.monotonic()
        with pytest.raises(fusedfog.PeerTimeout, match=f"gradients: waiting for rank {late}: nothing within .* 2 s"):
            summed_late(communicator, buffer)
        with pytest.raises(fusedfog.ExchangeError):  # Its connections are closed.
            summed_late(communicator, buffer)
        say("given up")
        return time.monotonic() - begin
    await_said("given up")
    with pytest.raises((fusedfog.ExchangeError, fusedfog.PeerTimeout), match=r"connection lost|rank 0 has given up"):
        summed_late(communicator, buffer)
    return 0.0


def summed_late(communicator: Communicator, buffer: Buffer) -> None:
    buffer.room(9, torch.float32)
    SharedTransfer(communicator, "gradients", add_up(buffer, 9, torch.float32)).wait()


def test_a_rank_that_does_not_come_is_named_after_the_timeout(ranks: Pool) -> None:
    assert ranks.run(2, too_late, 1)[0] < 20


# -- processes and memory ---------------------------------------------------------------------------------------------


def fork_and_die(path: str) -> str:
    """Rank 1 forks a child that lives on with what it inherited, writes to it, and is killed."""
    communicator, shared = opened()
    buffer = shared.buffer()
    flat = buffer.room(1000, torch.float32).fill_(1.0)
    if dist.get_rank() == 1:
        child = os.fork()
        if not child:
            assert flat.sum() == 0
            flat.fill_(7.0)
            Path(path).write_text(str(os.getpid()), encoding="ascii")
            time.sleep(60)
            os._exit(0)
        while not (Path(path).exists() and Path(path).read_text(encoding="ascii")):
            time.sleep(0.01)
    SharedTransfer(communicator, "", add_up(buffer, 1000, torch.float32)).wait()
    assert bool((flat == 2).all())
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        SharedTransfer(communicator, "", add_up(buffer, 1000, torch.float32)).wait()
    except fusedfog.ExchangeError as error:
        return str(error)
    finally:
        os.kill(int(Path(path).read_text(encoding="ascii")), signal.SIGKILL)
    return ""


def test_a_forked_child_neither_writes_nor_keeps_a_connection(ranks: Pool, tmp_path: Path) -> None:
    outcomes = ranks.outcomes(2, fork_and_die, str(tmp_path / "child"), pg_timeout=60)
    assert outcomes[1].error_type == "Died" and outcomes[0].ok and outcomes[0].seconds < 30
    assert "rank 1: connection lost" in outcomes[0].value or "rank 1 has ended" in outcomes[0].value


def counts() -> tuple[int, int, int]:
    return len(shared_memory._mapped), sum(shared_memory._mapped.values()), len(os.listdir("/proc/self/fd"))


def many_optimizers() -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """What there is after two optimizers, and after four."""
    mesh, found = init_device_mesh("cpu", (1, 2)), []
    for _ in range(4):
        model = nn.Linear(50, 50)
        opt = fusedfog.SGD(model.parameters(), lr=0.1, mesh=mesh)
        for _ in range(2):
            opt.zero_grad()
            model(torch.ones(2, 50)).sum().backward()
            opt.step()
        opt.drain()
        during = shared_memory._mapped.copy()
        del opt, model
        gc.collect()
        time.sleep(0.1)  # Its thread hears of the others' buffers, if it is not kept from it.
        dist.barrier()
        found.append(counts())
    deadline = time.monotonic() + 20
    while any(now > then for now, then in zip(counts(), found[1], strict=True)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert during and len(during) > counts()[0]
    return found[1], counts()


def test_optimizers_that_are_gone_leave_no_memory_and_no_descriptors(ranks: Pool) -> None:
    for two, four in ranks.run(2, many_optimizers):
        assert all(now <= then for now, then in zip(four, two, strict=True)), (two, four)


# -- where it cannot be -----------------------------------------------------------------------------------------------


def refused(who: int, how: str) -> tuple[list[Tensor], str]:
    """The parameters after some steps, and what the log says, if a rank's system lacks something."""
    lines: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("fusedfog")
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    before = shared_memory.SUPPORTED, shared_memory.allocate
    try:
        if dist.get_rank() == who and how == "memfd":
            shared_memory.SUPPORTED = False
        elif dist.get_rank() == who and how == "memory":
            shared_memory.allocate = no_memory
        torch.manual_seed(0)
        model = nn.Linear(6, 4)
        opt = fusedfog.SGD(model.parameters(), lr=0.1, mesh=init_device_mesh("cpu", (1, dist.get_world_size())))
        for step in range(3):
            opt.zero_grad()
            model(torch.full((2, 6), 1.0 + step + dist.get_rank())).square().sum().backward()
            opt.step()
    finally:
        shared_memory.SUPPORTED, shared_memory.allocate = before
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    return [p.detach().clone() for p in model.parameters()], " | ".join(lines)


def no_memory(nbytes: int) -> Any:
    raise OSError(28, f"no {nbytes} bytes")


@pytest.mark.parametrize(
    ("how", "why"), [("memfd", "rank 1: this system has no memfd"), ("memory", "rank 1: this system refuses")]
)
def test_all_ranks_go_on_by_messages_where_one_cannot_share(ranks: Pool, how: str, why: str) -> None:
    shared = ranks.run(2, refused, -1, how, pg_timeout=120)
    assert "ranks [0, 1] exchange with each other through shared memory" in shared[0][1]
    instead = ranks.run(2, refused, 1, how, pg_timeout=120)
    assert "ranks [0, 1] exchange with each other by messages (" in instead[0][1] and why in instead[0][1]
    for one, other in ((shared[0][0], instead[0][0]), (instead[0][0], instead[1][0])):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
