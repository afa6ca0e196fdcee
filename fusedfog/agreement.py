"""Do all ranks mean the same? A check of named fields across ranks, over the default store.

Every rank writes its fields, the group's rank 0 compares them with its own and writes a verdict, every rank reads it: O(n)
keys, no process group and no assumption about who hosts the store. A rank that does not come is named in the verdict.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from fusedfog.errors import MismatchError, PeerTimeout
from fusedfog.world import World

_SHOWN = 6


def agree(world: World, prefix: str, fields: Mapping[str, str], timeout: timedelta, what: str) -> None:
    """Return once every rank of `world` has given the same `fields`.

    Args:
        prefix: a key prefix that the ranks share and use once (`groups.next_agreement`).
        fields: name -> value, both as a user would want to read them in an error.
        timeout: how long to wait for the other ranks.
        what: who asks, for errors ("AdamW").

    Raises:
        MismatchError: on every rank, naming each differing rank and field with both values (the first few).
        PeerTimeout: a rank did not come to this check within `timeout`; names it.
    """
    store = dist.distributed_c10d._get_default_store()
    if world.rank:
        store.set(f"{prefix}/{world.rank}", json.dumps(dict(fields)))
    else:
        store.set(f"{prefix}/verdict", json.dumps(_judge(store, world, prefix, dict(fields), timeout)))
    if not _await(store, f"{prefix}/verdict", timeout):
        raise PeerTimeout(f"rank {world.rank}: {what}: rank 0 of the group did not come within {timeout}")
    kind, text = json.loads(store.get(f"{prefix}/verdict"))
    if store.add(f"{prefix}/readers", 1) == world.size:
        store.delete_key(f"{prefix}/verdict")
        store.delete_key(f"{prefix}/readers")
    if kind == "absent":
        raise PeerTimeout(f"rank {world.rank}: {what}: {text}")
    if kind == "differ":
        raise MismatchError(f"rank {world.rank}: {what} differs between ranks: {text}")


def _await(store: Store, key: str, timeout: timedelta) -> bool:
    try:
        store.wait([key], timeout)
    except RuntimeError:
        return False
    return True


def _judge(store: Store, world: World, prefix: str, own: dict[str, str], timeout: timedelta) -> tuple[str, str]:
    differences: list[str] = []
    # The others stop waiting for this verdict after `timeout`; a name that comes after that helps nobody.
    deadline = time.monotonic() + 0.8 * timeout.total_seconds()
    for rank in range(1, world.size):
        key = f"{prefix}/{rank}"
        if not _await(store, key, timedelta(seconds=max(0.01, deadline - time.monotonic()))):
            return "absent", f"rank {rank} did not come within {timeout}; it failed earlier, or builds fewer optimizers"
        theirs = json.loads(store.get(key))
        store.delete_key(key)
        differences += [
            f"{name} is {theirs.get(name, 'missing')} on rank {rank} but {own.get(name, 'missing')} on rank 0"
            for name in dict.fromkeys([*own, *theirs])
            if own.get(name) != theirs.get(name)
        ]
    if not differences:
        return "agree", ""
    more = f" (and {len(differences) - _SHOWN} more)" if len(differences) > _SHOWN else ""
    return "differ", "; ".join(differences[:_SHOWN]) + more
