"""What asynchronous optimizers do together: let everything arrive, and serve until every rank is done."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from fusedfog.comm.agreement import next_agreement
from fusedfog.comm.communicator import Communicator
from fusedfog.comm.mixing import mix
from fusedfog.comm.store import own_store
from fusedfog.engine.exchanges import Exchanges
from fusedfog.gossip.buckets import Buckets

_GLANCE = 0.005


class Engine(Protocol):
    """What this needs of a scheduler."""

    communicator: Communicator | None
    exchanges: Exchanges
    buckets: Buckets


def settle(engine: Engine, call: str) -> None:
    """Let all that was sent arrive, and take deposits in, so that masses sum to the number of ranks. Collective.

    Nothing for optimizers that are not asynchronous.
    """
    windows = engine.exchanges.windows
    if windows is None or not windows.open:
        return
    windows.settle(call)
    if not windows.deposits:
        return
    with torch.no_grad():
        for pass_group in engine.buckets.wholes:
            segment = pass_group.segment
            if segment.layout.mix:
                inbox = windows.inbox(segment)
                mix(segment.param, inbox.tensors[0], 1.0 - sum(inbox.weights), inbox.weights, 0)
    windows.use_up()
    engine.buckets.bump_versions()
    # Whoever goes on sends again, and another that has not looked yet would take that in as well.
    assert engine.communicator is not None
    engine.communicator.meet(call)


def discard(engine: Engine) -> None:
    """The same, and mix nothing that neighbours have sent until now. Collective."""
    settle(engine, "the end of messages in flight")
    if engine.exchanges.windows is not None:
        engine.exchanges.windows.forget()


def of_windows(engine: Engine) -> dict[str, Any]:
    """What `stats()` tells of an asynchronous optimizer's windows; nothing of others."""
    windows = engine.exchanges.windows
    if windows is None or not windows.open:
        return {}
    masses = windows.masses()
    mass = {"mass": sum(masses) / len(masses)} if windows.deposits else {}
    return {"neighbor_exchanges": windows.reached(), **mass}


class Finish:
    """One meeting of ranks that are done: each announces itself, and mixes what comes until all have, or have died."""

    def __init__(self, engine: Engine, steps: int) -> None:
        assert engine.communicator is not None and engine.exchanges.windows is not None
        self._windows, self._view = engine.exchanges.windows, engine.communicator.view
        self._store: Any = own_store()
        self._prefix = f"{next_agreement(self._view)}/finish"
        self._store.set(self._key("done", self._view.rank), str(steps))

    def _key(self, name: str, rank: int) -> str:
        return f"{self._prefix}/{name}/{rank}"

    def serve(self, mix_only: Callable[[], None]) -> list[int]:
        """Mix until all are done; returns how many steps each has made, -1 of a rank that has died."""
        self._windows.done = True
        waiting = set(range(self._view.size)) - {self._view.rank}
        looked = 0.0
        mix_only()  # So that the others learn that they need not wait for this one.
        while waiting:
            if self._windows.has_news():
                mix_only()
            if time.monotonic() - looked > 10 * _GLANCE:
                looked = time.monotonic()
                for rank in self._windows.dead():
                    self._store.set(self._key("dead", rank), "")
                waiting = {rank for rank in waiting if not self._over(rank)}
            time.sleep(_GLANCE)
        self._windows.done = False
        return [self._steps(rank) for rank in range(self._view.size)]

    def _over(self, rank: int) -> bool:
        return bool(self._store.check([self._key("done", rank)]) or self._store.check([self._key("dead", rank)]))

    def _steps(self, rank: int) -> int:
        key = self._key("done", rank)
        return int(self._store.get(key)) if self._store.check([key]) else -1
