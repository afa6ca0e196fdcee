"""How other ranks' records come to rank 0: through the process group's store, by threads, without a collective.

Every rank writes its records under keys of its own, a ring of them, and rank 0 reads and deletes what it finds. Nobody waits
for anybody: if rank 0 reads too slowly, the oldest records are written over, and counted. The threads use a connection of
their own, so that a step never waits for one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fusedfog.comm.group import GroupView
from fusedfog.watch.records import Record

RING = 128
"""Records of a rank that wait in the store at most."""

_PATIENCE = timedelta(seconds=10)
"""A store that does not answer for so long is taken for lost."""


class _Counters:
    """How many monitors this process has made in each set of ranks; ranks make theirs in the same order."""

    default: object = None
    numbers: dict[tuple[int, ...], int] = {}  # noqa: RUF012


def _prefix(view: GroupView) -> str:
    # Not `next_agreement`: a monitor on one rank alone must not put its other calls out of step.
    default = dist.distributed_c10d._get_default_group()
    if _Counters.default is not default:
        _Counters.default, _Counters.numbers = default, {}
    number = _Counters.numbers.get(view.ranks, 0)
    _Counters.numbers[view.ranks] = number + 1
    return f"fusedfog/watch/{'-'.join(map(str, view.ranks[:16]))}/{len(view.ranks)}/{number}"


class Relay:
    """This rank's end."""

    def __init__(self, view: GroupView) -> None:
        self.view, self._prefix = view, _prefix(view)
        store: Any = dist.distributed_c10d._get_default_store()
        self._store = store.clone()
        self._store.set_timeout(_PATIENCE)
        self._written = 0
        self._next = dict.fromkeys(range(1, view.size), 0)
        self.missed = 0

    def send(self, record: Record) -> None:
        """Leave a record for rank 0."""
        self._store.set(self._key(self.view.rank, self._written), json.dumps([self._written, record]))
        self._written += 1

    def receive(self) -> Iterator[Record]:
        """On rank 0, the records that have come, each rank's in their order."""
        for rank in self._next:
            while self._store.check([self._key(rank, self._next[rank])]):
                key = self._key(rank, self._next[rank])
                number, record = json.loads(self._store.get(key))
                if number != self._next[rank]:
                    # The ring has gone round: this is its newest record, and its oldest has the next key.
                    self.missed += number - RING + 1 - self._next[rank]
                    self._next[rank] = number - RING + 1
                    continue
                self._store.delete_key(key)
                self._next[rank] = number + 1
                yield record

    def _key(self, rank: int, number: int) -> str:
        return f"{self._prefix}/{rank}/{number % RING}"
