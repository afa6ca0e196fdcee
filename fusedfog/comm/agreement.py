"""Do all ranks mean the same? Values that all ranks give in the same call, judged by one of them, over the default store.

Every rank writes the call that it is in and its value, the group's rank 0 judges them and writes a verdict, every rank reads
it: O(n) keys, no process group and no assumption about who hosts the store. A rank that does not come, or is in another
call, is named in the verdict. Nothing has been posted to the process group meanwhile, where two ranks in different collective
operations wait for each other until the timeout, or worse: gloo ends the process over a message of another size.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch.distributed as dist
from torch._C._distributed_c10d import Store

from fusedfog.comm import calls
from fusedfog.comm.failures import FIRST_LOOK, LOOK_EVERY
from fusedfog.comm.group import GroupView, Members, Ranks, unbound
from fusedfog.comm.store import own_store
from fusedfog.comm.whereabouts import name_ranks
from fusedfog.errors import MismatchError, PeerTimeout

_SHOWN = 6

_SHORTEST_PAUSE, _LONGEST_PAUSE = 5e-4, 2e-2
"""Seconds between questions to the store, doubling."""


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


def agree(
    view: GroupView,
    prefix: str,
    fields: Mapping[str, str],
    timeout: timedelta,
    what: str,
    call: str = "",
    told: Any = None,
) -> list[Any]:
    """Return once every rank of `view` has given the same `fields`.

    Args:
        prefix: a key prefix that the ranks share and use once (`next_agreement`).
        fields: name -> value, both as a user would want to read them in an error.
        timeout: how long to wait for the other ranks.
        what: who asks, for errors ("AdamW").
        call: what all ranks must be in; `what` by default.
        told: what this rank tells the others besides, which may differ; whatever JSON can write.

    Returns:
        What each rank told, in rank order.

    Raises:
        MismatchError: on every rank, naming each differing rank and field with both values (the first few), or who is in
            which other call.
        PeerTimeout: a rank did not come to this check within `timeout`; names it.
    """
    found, everything = confer(view, prefix, [dict(fields), told], _compare, timeout, what, call)
    if found:
        raise MismatchError(f"rank {view.rank}: {what} differs between ranks: {found}")
    return list(everything)


def _compare(values: Sequence[Any]) -> tuple[str, list[Any]]:
    return differences([fields for fields, _ in values]), [told for _, told in values]


def differences(fields: Sequence[Mapping[str, str]]) -> str:
    """In which fields ranks differ from the first one, in words; "" in none."""
    own, *others = fields
    found = [
        f"{name} is {theirs.get(name, 'missing')} on rank {rank} but {own.get(name, 'missing')} on rank 0"
        for rank, theirs in enumerate(others, 1)
        for name in dict.fromkeys([*own, *theirs])
        if own.get(name) != theirs.get(name)
    ]
    more = f" (and {len(found) - _SHOWN} more)" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def confer(
    view: GroupView,
    prefix: str,
    value: Any,
    judge: Callable[[Sequence[Any]], Any],
    timeout: timedelta,
    what: str,
    call: str = "",
) -> Any:
    """What `judge` makes of all ranks' values, on every rank.

    Args:
        prefix, timeout, what, call: as for `agree`.
        value: this rank's; whatever JSON can write, NaN included.
        judge: called on the group's rank 0, with the values in rank order; returns what JSON can write.

    Raises:
        MismatchError: another rank is in another call; names both.
        PeerTimeout: a rank did not come within `timeout`; names it.
    """
    calls.enter_world(timeout.total_seconds())
    store, own = own_store(), [call or what, value]
    if view.rank:
        store.set(f"{prefix}/{view.rank}", json.dumps(own))
    else:
        store.set(f"{prefix}/verdict", json.dumps(_collect(store, view, prefix, own, judge, timeout, what)))
    if absent(store, [f"{prefix}/verdict"], timeout, view, what):
        raise PeerTimeout(f"rank {view.rank}: {what}: rank 0 of the group did not come within {timeout}")
    kind, verdict = json.loads(store.get(f"{prefix}/verdict"))
    if store.add(f"{prefix}/readers", 1) == view.size:
        store.delete_key(f"{prefix}/verdict")
        store.delete_key(f"{prefix}/readers")
    if kind == "absent":
        raise PeerTimeout(f"rank {view.rank}: {what}: {verdict}")
    if kind == "elsewhere":
        raise MismatchError(f"rank {view.rank}: {what}: {verdict}")
    return verdict


def absent(store: Store, keys: Sequence[str], timeout: timedelta, view: Ranks, what: str = "") -> list[int]:
    """The places of those keys that nobody writes within `timeout`.

    Args:
        view: the ranks without which they will not all be written.
        what: who waits, for errors.

    Raises:
        ExchangeError: one of these ranks has ended; names it.
        RuntimeError: the store cannot be reached.
    """
    begin = time.monotonic()
    deadline, look_at = begin + timeout.total_seconds(), begin + FIRST_LOOK
    vigil, pause = calls.vigil(), _SHORTEST_PAUSE
    # `store.wait` would block for all of the timeout, or log two lines each time that it is given less.
    while not store.check(list(keys)):
        now = time.monotonic()
        if now >= deadline:
            return [place for place, key in enumerate(keys) if not store.check([key])]
        if now >= look_at and vigil is not None:
            calls.remember_addresses(view)
            origin = vigil.look(view.ranks, None)
            if origin is not None and not store.check(list(keys)):
                raise calls.lost(view, f"rank {view.rank}: {what or calls.current_call()}", origin)
            look_at = time.monotonic() + LOOK_EVERY
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return []


def _collect(
    store: Store,
    view: GroupView,
    prefix: str,
    own: list[Any],
    judge: Callable[[Sequence[Any]], Any],
    timeout: timedelta,
    what: str,
) -> tuple[str, Any]:
    keys = [f"{prefix}/{rank}" for rank in range(1, view.size)]
    # The others stop waiting for this verdict after `timeout`; a name that comes after that helps nobody.
    missing = [place + 1 for place in absent(store, keys, 0.8 * timeout, view, what)]
    if missing:
        return "absent", f"{name_ranks(missing)} did not come within {timeout}"
    found = [own, *(json.loads(text) for text in _read(store, keys))]
    for key in keys:
        store.delete_key(key)
    names: dict[str, list[int]] = {}
    for rank, (name, _) in enumerate(found):
        names.setdefault(name, []).append(rank)
    if len(names) > 1:
        parts = [f"{name_ranks(ranks)} {'are' if len(ranks) > 1 else 'is'} in {name}" for name, ranks in names.items()]
        return "elsewhere", f"{', '.join(parts)}: every rank must call the same"
    return "judged", judge([value for _, value in found])


def _read(store: Any, keys: Sequence[str]) -> list[bytes]:
    if keys and store.has_extended_api():
        return list(store.multi_get(list(keys)))
    return [store.get(key) for key in keys]


def level_group_counts(ranks: tuple[int, ...], timeout: timedelta) -> None:
    """Give every member of a subgroup the same number of process groups before they create one among themselves.

    torch names a locally synchronized group after its ranks and the number of groups the process already has, so members
    with different numbers would wait for each other under different names until the timeout.

    Raises:
        PeerTimeout: a member did not come within `timeout`; names it.
    """
    calls.enter_world(timeout.total_seconds())
    store, prefix = own_store(), _next_agreement(ranks)
    own = len(dist.distributed_c10d._world.pg_names)
    me = dist.get_rank()
    store.set(f"{prefix}/{ranks.index(me)}", str(own))
    keys = [f"{prefix}/{place}" for place in range(len(ranks))]
    missing = absent(
        store, keys, timeout, Members(ranks.index(me), ranks), f"a new group of global ranks {list(ranks)}"
    )
    if missing:
        raise PeerTimeout(
            f"rank {ranks.index(me)}: a new group of global ranks {list(ranks)}: {name_ranks(missing)} of it did not come "
            f"within {timeout}"
        )
    with unbound():
        for _ in range(max(int(store.get(key)) for key in keys) - own):
            dist.new_group([me], backend="gloo", use_local_synchronization=True)
