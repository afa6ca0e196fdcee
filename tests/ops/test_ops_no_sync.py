"""Operations on GPU tensors and their edge check: no host waits for a GPU, not even to learn what others send."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from support import ordered_backend
from support.pool import Pool
from support.waits import await_said, meet, say

import fusedfog
from fusedfog.comm.group import find_group
from fusedfog.comm.registry import communicator_for
from fusedfog.kernels import device
from fusedfog.ops import control


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    ordered_backend.build()


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Tensors count as a GPU's, and whatever would have the host wait for a GPU raises."""

    def refuse(name: str) -> Any:
        def waits(*args: Any, **keywords: Any) -> Any:
            raise AssertionError(f"{name} has the host wait for the GPU")

        return waits

    names = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero")
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(device, "on_gpu", lambda where: True))
        for name in names:
            stack.enter_context(mock.patch.object(torch.Tensor, name, refuse(name)))
        # Tensors made of host numbers are copied from pageable memory.
        for name in ("tensor", "from_numpy", "as_tensor"):
            stack.enter_context(mock.patch.object(torch, name, refuse(f"torch.{name}")))
        yield


# The GPU's kernel takes no doubles, so that these are mixed by torch's own.
def everything(check: bool) -> list[Any]:
    ordered_backend.open_world()
    rank, size = dist.get_rank(), dist.get_world_size()
    x = torch.full((3,), float(rank), dtype=torch.float64)
    rows = torch.full((rank, 2), float(rank))
    left = (rank - 1) % size
    with no_waiting():
        results = [
            fusedfog.neighbor_allreduce(x, "ring", check=check),
            fusedfog.neighbor_allgather(rows, "ring", check=check),
            fusedfog.pair_gossip(x, rank ^ 1, check=check),
        ]
        if check:  # One side alone: the check tells the others.
            results.append(fusedfog.neighbor_allreduce(x, self_weight=0.5, recv_weights={left: 0.5}))
            results.append(fusedfog.neighbor_allreduce(x, "ring", wire_dtype="int8"))
    return [result.tolist() for result in results]


@pytest.mark.parametrize("check", [True, False])
def test_operations_on_gpu_tensors_do_not_wait_for_the_gpu(ranks: Pool, check: bool) -> None:
    for rank, results in enumerate(ranks.run(4, everything, check, init=False)):
        left, right = (rank - 1) % 4, (rank + 1) % 4
        assert results[0] == pytest.approx([(rank + left + right) / 3] * 3)
        assert results[1] == [[float(peer)] * 2 for peer in sorted((left, right)) for _ in range(peer)]
        assert results[2] == [(rank + (rank ^ 1)) / 2] * 3
        if check:
            assert results[3] == [(rank + left) / 2] * 3
            assert results[4] == pytest.approx(results[0], abs=0.1)


def mismatch() -> list[str]:
    ordered_backend.open_world()
    rank = dist.get_rank()
    said = []
    with no_waiting():
        for shape, peer in (((3 + (rank == 2),), None), ((3,), 0 if rank == 1 else None)):
            with pytest.raises(ValueError) as error:
                if not said:
                    fusedfog.neighbor_allreduce(torch.ones(shape, dtype=torch.float64), "ring")
                else:
                    fusedfog.pair_gossip(torch.ones(shape, dtype=torch.float64), peer)
            said.append(f"{type(error.value).__name__}: {error.value}")
        # Nothing is left over that the next operation would take for its own.
        said.append(str(fusedfog.neighbor_allgather(torch.ones(1, 1), "ring").shape[0]))
    return said


def test_what_is_wrong_is_still_said_on_every_rank(ranks: Pool) -> None:
    for shapes, pairs, rows in ranks.run(3, mismatch, init=False):
        assert shapes.startswith("MismatchError")
        assert "rank 2 has" in shapes or "but rank 2 has" in shapes
        assert pairs.startswith("MismatchError")
        assert "rank 1 expects a message from rank 0" in pairs
        assert rows == "2"


def late(check: bool) -> str:
    ordered_backend.open_world()
    with mock.patch.object(device, "on_gpu", lambda where: True):
        communicator = communicator_for(find_group(), torch.device("cpu"))
        meet("opened")
        if dist.get_rank() == 1:
            await_said("given up")
            return ""
        ordered_backend.shorten(communicator, 1.0)
        with pytest.raises(fusedfog.PeerTimeout) as error:
            fusedfog.neighbor_allgather(torch.ones(1), recv_ranks=[1], send_ranks=[1], check=check)
        say("given up")
        return str(error.value)


@pytest.mark.parametrize("check", [True, False])
def test_a_rank_that_does_not_come_is_a_timeout(ranks: Pool, check: bool) -> None:
    text = ranks.run(2, late, check, init=False)[0]
    assert text.startswith("rank 0: neighbor_allgather")
    assert ("neighbor_allgather, with all ranks" if check else "receiving from rank 1") in text


def leftovers() -> tuple[int, int]:
    ordered_backend.open_world()
    store = dist.distributed_c10d._get_default_store()
    with mock.patch.object(device, "on_gpu", lambda where: True):
        x = torch.ones(2, dtype=torch.float64)
        fusedfog.neighbor_allreduce(x, "ring")
        _quiet(store, "first")
        before = store.num_keys()
        _quiet(store, "read")
        for _ in range(3):
            fusedfog.neighbor_allreduce(x, "ring")
            fusedfog.neighbor_allgather(x, "ring")
            fusedfog.neighbor_allreduce(x, self_weight=1.0, recv_weights={})
        _quiet(store, "second")
        return before, store.num_keys()


def _quiet(store: Any, name: str) -> None:
    if store.add(f"quiet/{name}", 1) == dist.get_world_size():
        store.set(f"quiet/{name}/all", "")
    store.wait([f"quiet/{name}/all"])


def test_what_hosts_tell_each_other_is_cleaned_up(ranks: Pool) -> None:
    for before, after in ranks.run(3, leftovers, init=False):
        # The four keys of `_quiet` itself that came in between; `deleteKey` of a counter leaves nothing.
        assert after - before <= 4


def test_a_cpu_backend_beside_nccl_carries_what_hosts_say() -> None:
    nccl, gloo = object(), object()
    both = SimpleNamespace(_get_backend=lambda place: gloo if place.type == "cpu" else nccl)

    def only(place: torch.device) -> object:
        if place.type == "cpu":
            raise RuntimeError("No backend type associated with device type cpu")
        return nccl

    alone = SimpleNamespace(_get_backend=only)
    place = torch.device("cuda", 0)
    for group, expected in ((both, True), (alone, False)):
        communicator: Any = SimpleNamespace(on_gpu=True, group=group, device=place)
        assert control._has_cpu_backend(communicator) is expected
