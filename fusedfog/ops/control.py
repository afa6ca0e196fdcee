"""Small numbers that hosts tell each other before an operation; no GPU is asked, and no host waits for one.

Where the group has a CPU backend beside NCCL (`fusedfog.init()` makes both) they travel by it, else through the store.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from fusedfog.comm.agreement import next_agreement
from fusedfog.comm.communicator import Communicator

_CPU = torch.device("cpu")


def add_up(link: Communicator, numbers: Sequence[int]) -> list[int]:
    """The sums of the ranks' integers, on every rank.

    Raises:
        RuntimeError: a rank did not come, or has gone.
    """
    if _has_cpu_backend(link):
        total = torch.tensor(numbers)
        dist.all_reduce(total, group=link.group)
        return [int(number) for number in total.tolist()]
    store, prefix = _store(link)
    keys = [f"{prefix}/{place}" for place in range(len(numbers))]
    for key, number in zip(keys, numbers, strict=True):
        store.add(key, number)
    _meet(link, store, prefix)
    totals = [store.add(key, 0) for key in keys]
    _clean_up(link, store, prefix, keys)
    return totals


def gather(link: Communicator, value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank.

    Raises:
        RuntimeError: a rank did not come, or has gone.
    """
    if _has_cpu_backend(link):
        gathered: list[Any] = [None] * link.world.size
        dist.all_gather_object(gathered, value, group=link.group)
        return gathered
    store, prefix = _store(link)
    keys = [f"{prefix}/{rank}" for rank in range(link.world.size)]
    store.set(keys[link.world.rank], base64.b64encode(pickle.dumps(value)).decode())
    store.wait(keys, link.timeout)
    gathered = [pickle.loads(base64.b64decode(store.get(key))) for key in keys]
    _clean_up(link, store, prefix, keys)
    return gathered


def tell(link: Communicator, numbers: Mapping[int, int], sources: Sequence[int], tag: int, label: str) -> list[int]:
    """Send a number to each of some ranks, and receive one from each of `sources`, in their order.

    Args:
        tag: tells this from other tellings between the same ranks; from `Port.tags`.
        label: what this is, for errors.

    Raises:
        PeerTimeout, ExchangeError: a rank did not come, or has gone.
    """
    if not link.on_gpu:
        sent = [(peer, torch.tensor([number])) for peer, number in numbers.items()]
        came = [(peer, torch.zeros(1, dtype=torch.int64)) for peer in sources]
        link.start(sent, came, tag=tag, label=label).wait()
        return [int(tensor.item()) for _, tensor in came]
    store, me = dist.distributed_c10d._get_default_store(), link.world.rank
    for peer, number in numbers.items():
        store.set(f"{link.name}/{tag}/{me}-{peer}", str(number))
    found = []
    for peer in sources:
        key = f"{link.name}/{tag}/{peer}-{me}"
        try:
            store.wait([key], link.timeout)
        except RuntimeError as error:
            raise link.failure(error, f"{label}: receiving from rank {peer}") from error
        found.append(int(store.get(key)))
        store.delete_key(key)
    return found


def _has_cpu_backend(link: Communicator) -> bool:
    """Whether the link's group can move CPU tensors, by another backend than that of the GPU's."""
    if not link.on_gpu:
        return True
    try:
        return link.group._get_backend(_CPU) is not link.group._get_backend(link.device)
    except RuntimeError:  # There is none.
        return False


def _store(link: Communicator) -> tuple[Any, str]:
    _ = link.group  # Raises why the link has ended, if it has.
    return dist.distributed_c10d._get_default_store(), next_agreement(link.world)


def _meet(link: Communicator, store: Any, prefix: str) -> None:
    if store.add(f"{prefix}/came", 1) == link.world.size:
        store.set(f"{prefix}/all", "")
    store.wait([f"{prefix}/all"], link.timeout)


def _clean_up(link: Communicator, store: Any, prefix: str, keys: Sequence[str]) -> None:
    """The last to have read deletes what was written."""
    if store.add(f"{prefix}/read", 1) == link.world.size:
        for key in (*keys, f"{prefix}/came", f"{prefix}/all", f"{prefix}/read"):
            store.delete_key(key)
