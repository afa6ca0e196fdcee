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
from fusedfog.engine.clock import Clock
from fusedfog.engine.exchanges import Exchanges
from fusedfog.gossip.buckets import Buckets

_GLANCE = 0.005


class Serving(Protocol):
    """What this needs of `between_phases.Members`."""

    def is_waited_for(self) -> bool:
        """Whether somebody waits for this rank's next step."""

    def serve(self, clock: tuple[int, int] | None) -> None:
        """From now on steps only mix, after so many steps and exchanges; for None, they do more again."""


class Engine(Protocol):
    """What this needs of a scheduler."""

    communicator: Communicator | None
    exchanges: Exchanges
    buckets: Buckets


class Finishing(Engine, Protocol):
    """What `finish` needs of a scheduler."""

    clock: Clock

    @property
    def members(self) -> Serving | None:
        """Who the ranks are in an elastic run."""


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


def finish(engine: Finishing, mix_only: Callable[[], None]) -> list[int]:
    """Mix until all ranks are done; how many steps each has made, -1 of one that has died. Collective.

    In an elastic run members come and go meanwhile, and those that there are at the end are counted.
    """
    clock, members = engine.clock, engine.members
    steps, exchanges = clock.steps, clock.exchanges
    if members is not None:
        members.serve((steps, exchanges))
    try:
        found: list[int] | None = None
        while found is None:
            found = [steps] if engine.communicator is None else Finish(engine, steps).serve(mix_only)
    finally:
        # Steps that only mixed are none of training.
        clock.steps, clock.exchanges = steps, exchanges
        if members is not None:
            members.serve(None)
    return found


class Finish:
    """One meeting of ranks that are done: each announces itself, and mixes what comes until all have, or have died.

    Members of an elastic run may go over to others in a step of theirs. Whether all were done before is one verdict then, which
    whoever comes first writes into the store: else one would go on that others wait for.
    """

    def __init__(self, engine: Finishing, steps: int) -> None:
        assert engine.communicator is not None and engine.exchanges.windows is not None
        self._engine, self._communicator = engine, engine.communicator
        self._windows, self._view = engine.exchanges.windows, engine.communicator.view
        self._store: Any = own_store()
        self._prefix = f"{next_agreement(self._view)}/finish"
        self._waiting, self._looked = set(range(self._view.size)), 0.0
        self._store.set(self._key("done", self._view.rank), str(steps))

    def _key(self, name: str, rank: int) -> str:
        return f"{self._prefix}/{name}/{rank}"

    def serve(self, mix_only: Callable[[], None]) -> list[int] | None:
        """Mix until all are done; returns how many steps each has made, -1 of a rank that has died.

        None if the members have changed before all were done: those that there are now meet anew.
        """
        members = self._engine.members
        self._windows.done = True
        mix_only()  # So that the others learn that they need not wait for this one.
        while not self._changed() and not self._complete():
            if self._windows.has_news() or (members is not None and members.is_waited_for()):
                mix_only()
            time.sleep(_GLANCE)
        self._windows.done = False
        if self._changed() and self._verdict("again") == "again":
            return None
        return [self._steps(rank) for rank in range(self._view.size)]

    def _changed(self) -> bool:
        return self._engine.communicator is not self._communicator

    def _complete(self) -> bool:
        """Whether all are done, or have died; looked at now and then."""
        if time.monotonic() - self._looked < 10 * _GLANCE:
            return False
        self._looked = time.monotonic()
        for rank in self._windows.dead() if self._engine.members is None else ():
            self._store.set(self._key("dead", rank), "")
        self._waiting = {rank for rank in self._waiting if not self._over(rank)}
        return not self._waiting and self._verdict("done") == "done"

    def _verdict(self, own: str) -> str:
        """Whether all were "done" before the members changed; where they cannot, at once."""
        if self._engine.members is None:
            return own
        return str(self._store.compare_set(f"{self._prefix}/verdict", "", own).decode())

    def _over(self, rank: int) -> bool:
        return bool(self._store.check([self._key("done", rank)]) or self._store.check([self._key("dead", rank)]))

    def _steps(self, rank: int) -> int:
        key = self._key("done", rank)
        return int(self._store.get(key)) if self._store.check([key]) else -1
