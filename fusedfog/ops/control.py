"""Small numbers that hosts tell each other before an operation; no GPU is asked, and no host waits for one.

Where the group has a CPU backend beside NCCL (`fusedfog.init()` makes both) they travel by it, else through the store.
"""

from __future__ import annotations

import base64
import pickle
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from fusedfog.comm.agreement import absent, next_agreement
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.store import own_store

_CPU = torch.device("cpu")


def add_up(communicator: Communicator, numbers: Sequence[int], what: str) -> list[int]:
    """The sums of the ranks' integers, on every rank; `what` says of what, for errors.

    Raises:
        PeerTimeout, ExchangeError: a rank did not come, or has gone.
    """
    if _has_cpu_backend(communicator):
        total = torch.tensor(numbers)
        communicator.collect(partial(dist.all_reduce, total, async_op=True), what)
        return [int(number) for number in total.tolist()]
    return communicator.run(lambda: _add_up_by_store(communicator, numbers), what)


def _add_up_by_store(communicator: Communicator, numbers: Sequence[int]) -> list[int]:
    store, prefix = _store(communicator)
    keys = [f"{prefix}/{place}" for place in range(len(numbers))]
    for key, number in zip(keys, numbers, strict=True):
        store.add(key, number)
    _meet(communicator, store, prefix)
    totals = [store.add(key, 0) for key in keys]
    _clean_up(communicator, store, prefix, keys)
    return totals


def gather(communicator: Communicator, value: Any, what: str) -> list[Any]:
    """Every rank's value, in rank order, on every rank; `what` says of what, for errors.

    Raises:
        PeerTimeout, ExchangeError: a rank did not come, or has gone.
    """
    return communicator.run(lambda: _gather(communicator, value), what)


def _gather(communicator: Communicator, value: Any) -> list[Any]:
    if _has_cpu_backend(communicator):
        gathered: list[Any] = [None] * communicator.view.size
        dist.all_gather_object(gathered, value, group=communicator.group)
        return gathered
    store, prefix = _store(communicator)
    keys = [f"{prefix}/{rank}" for rank in range(communicator.view.size)]
    store.set(keys[communicator.view.rank], base64.b64encode(pickle.dumps(value)).decode())
    _await(communicator, store, keys)
    gathered = [pickle.loads(base64.b64decode(store.get(key))) for key in keys]
    _clean_up(communicator, store, prefix, keys)
    return gathered


def tell(
    communicator: Communicator, numbers: Mapping[int, int], sources: Sequence[int], tag: int, label: str
) -> list[int]:
    """Send a number to each of some ranks, and receive one from each of `sources`, in their order.

    Args:
        tag: tells this from other tellings between the same ranks; from `Port.tags`.
        label: what this is, for errors.

    Raises:
        PeerTimeout, ExchangeError: a rank did not come, or has gone.
    """
    if not communicator.on_gpu:
        sent = [(peer, torch.tensor([number])) for peer, number in numbers.items()]
        came = [(peer, torch.zeros(1, dtype=torch.int64)) for peer in sources]
        communicator.start(sent, came, tag=tag, label=label).wait()
        return [int(tensor.item()) for _, tensor in came]
    store, me = own_store(), communicator.view.rank
    for peer, number in numbers.items():
        store.set(f"{communicator.name}/{tag}/{me}-{peer}", str(number))
    found = []
    for peer in sources:
        key = f"{communicator.name}/{tag}/{peer}-{me}"
        try:
            _await(communicator, store, [key])
        except RuntimeError as error:
            raise communicator.conclude(
                communicator.failure(error, f"{label}: receiving from rank {peer}"), [peer]
            ) from error
        found.append(int(store.get(key)))
        store.delete_key(key)
    return found


def _has_cpu_backend(communicator: Communicator) -> bool:
    """Whether the communicator's group can move CPU tensors, by another backend than that of the GPU's."""
    if not communicator.on_gpu:
        return True
    try:
        return communicator.group._get_backend(_CPU) is not communicator.group._get_backend(communicator.device)
    except RuntimeError:  # There is none.
        return False


def _store(communicator: Communicator) -> tuple[Any, str]:
    _ = communicator.group  # Raises why the communicator has ended, if it has.
    return own_store(), next_agreement(communicator.view)


def _meet(communicator: Communicator, store: Any, prefix: str) -> None:
    if store.add(f"{prefix}/came", 1) == communicator.view.size:
        store.set(f"{prefix}/all", "")
    _await(communicator, store, [f"{prefix}/all"])


def _await(communicator: Communicator, store: Any, keys: Sequence[str]) -> None:
    """Return once these keys are there; RuntimeError after the timeout, ExchangeError as soon as a rank has ended."""
    missing = absent(store, keys, communicator.timeout, communicator.view)
    if missing:
        raise RuntimeError(f"timed out waiting for {[keys[place] for place in missing]}")


def _clean_up(communicator: Communicator, store: Any, prefix: str, keys: Sequence[str]) -> None:
    """The last to have read deletes what was written."""
    if store.add(f"{prefix}/read", 1) == communicator.view.size:
        for key in (*keys, f"{prefix}/came", f"{prefix}/all", f"{prefix}/read"):
            store.delete_key(key)
