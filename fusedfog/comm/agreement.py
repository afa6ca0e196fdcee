"""Do all ranks mean the same? A check of named fields across ranks, over the default store.

Every rank writes its fields, the group's rank 0 compares them with its own and writes a verdict, every rank reads it: O(n)
keys, no process group and no assumption about who hosts the store. A rank that does not come is named in the verdict.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import ClassVar

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from fusedfog.comm.group import GroupView, unbound
from fusedfog.errors import MismatchError, PeerTimeout

_SHOWN = 6


class _Agreements:
    """How often each set of ranks has agreed on something in the current world; a new world starts afresh."""

    default: ClassVar[dist.ProcessGroup | None] = None
    numbers: ClassVar[dict[tuple[int, ...], int]] = {}


def next_agreement(view: GroupView) -> str:
    """A store key prefix for the next thing these ranks agree on, the same on each of them."""
    return _next_agreement(view.ranks)


def _next_agreement(ranks: tuple[int, ...]) -> str:
    default = dist.distributed_c10d._get_default_group()
    if _Agreements.default is not default:
        _Agreements.default, _Agreements.numbers = default, {}
    number = _Agreements.numbers.get(ranks, 0)
    _Agreements.numbers[ranks] = number + 1
    members = "-".join(map(str, ranks)) if len(ranks) <= 16 else f"{hash(ranks):x}"
    return f"fusedfog/{members}/{number}"


def agree(view: GroupView, prefix: str, fields: Mapping[str, str], timeout: timedelta, what: str) -> None:
    """Return once every rank of `view` has given the same `fields`.

    Args:
        prefix: a key prefix that the ranks share and use once (`next_agreement`).
        fields: name -> value, both as a user would want to read them in an error.
        timeout: how long to wait for the other ranks.
        what: who asks, for errors ("AdamW").

    Raises:
        MismatchError: on every rank, naming each differing rank and field with both values (the first few).
        PeerTimeout: a rank did not come to this check within `timeout`; names it.
    """
    store = dist.distributed_c10d._get_default_store()
    if view.rank:
        store.set(f"{prefix}/{view.rank}", json.dumps(dict(fields)))
    else:
        store.set(f"{prefix}/verdict", json.dumps(_judge(store, view, prefix, dict(fields), timeout)))
    if not _await(store, f"{prefix}/verdict", timeout):
        raise PeerTimeout(f"rank {view.rank}: {what}: rank 0 of the group did not come within {timeout}")
    kind, text = json.loads(store.get(f"{prefix}/verdict"))
    if store.add(f"{prefix}/readers", 1) == view.size:
        store.delete_key(f"{prefix}/verdict")
        store.delete_key(f"{prefix}/readers")
    if kind == "absent":
        raise PeerTimeout(f"rank {view.rank}: {what}: {text}")
    if kind == "differ":
        raise MismatchError(f"rank {view.rank}: {what} differs between ranks: {text}")


def _await(store: Store, key: str, timeout: timedelta) -> bool:
    try:
        store.wait([key], timeout)
    except RuntimeError:
        return False
    return True


def _judge(store: Store, view: GroupView, prefix: str, own: dict[str, str], timeout: timedelta) -> tuple[str, str]:
    differences: list[str] = []
    # The others stop waiting for this verdict after `timeout`; a name that comes after that helps nobody.
    deadline = time.monotonic() + 0.8 * timeout.total_seconds()
    for rank in range(1, view.size):
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


def level_group_counts(ranks: tuple[int, ...], timeout: timedelta) -> None:
    """Give every member of a subgroup the same number of process groups before they create one among themselves.

    torch names a locally synchronized group after its ranks and the number of groups the process already has, so members
    with different numbers would wait for each other under different names until the timeout.
    """
    store, prefix = dist.distributed_c10d._get_default_store(), _next_agreement(ranks)
    own = len(dist.distributed_c10d._world.pg_names)
    me = dist.get_rank()
    store.set(f"{prefix}/{ranks.index(me)}", str(own))
    keys = [f"{prefix}/{place}" for place in range(len(ranks))]
    store.wait(keys, timeout)
    with unbound():
        for _ in range(max(int(store.get(key)) for key in keys) - own):
            dist.new_group([me], backend="gloo", use_local_synchronization=True)
