"""The loop of `fusedfog run` on one machine: start its ranks, certify deaths, start the dead again, pass signals on.

What it says in the stores, under `fusedfog/RUN/`:

    dead/SLOT.INCARNATION   how a process ended, as waitpid tells it: that it will never answer again is certain
    beat/SLOT.INCARNATION   a counter, every second while the process lives and is not stopped. Python threads of a process do not
                            run while a call holds its lock, which a large save may do for long; this one runs elsewhere
    launcher/NODE, launcher-beat/NODE, finished/NODE       who runs a machine's places, that it still does, and that it is through
    incarnation/SLOT        that of the newest process of this place
    shape                   machines and ranks on each
    failed                  why all end, where ranks are not elastic

A process that calls `fusedfog.init(elastic=True)` takes its place, `slot/SLOT`, and the members of such a run have a `record`.
Where the store has neither, a death ends all, as with torchrun.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import time
from queue import Empty, SimpleQueue
from types import FrameType

from torch._C._distributed_c10d import Store

from fusedfog.cli.run_rank import Plan, RankProcess, words
from fusedfog.cli.run_stores import EVERY, Address, Stores
from fusedfog.comm.elastic.record import read_record
from fusedfog.comm.whereabouts import name_ranks
from fusedfog.errors import LaunchError

GRACE = 30.0
"""Seconds between a request to end, and SIGKILL."""

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)

MEETING = 300.0
"""Seconds in which some store answers a launcher that hosts none, and in which the others come to an end after this one."""

STILL = 3.0
"""Seconds of a counter that stands still after which a launcher is gone, for another that wants its place."""


class Launcher:
    """The launcher of one machine.

    Args:
        plan: what it starts.
        stores: of the run; this machine's, if it has one, is there already.
    """

    def __init__(self, plan: Plan, stores: Stores) -> None:
        self._plan, self._stores = plan, stores
        self._events: SimpleQueue[RankProcess | int] = SimpleQueue()
        self._ranks: dict[int, RankProcess] = {}
        self._restarts = dict.fromkeys(range(plan.local), 0)
        self._ended: dict[int, int] = {}
        self._beats, self._elastic = 0, False
        self._status: int | None = None
        self._kill_at = float("inf")

    def run(self) -> int:
        """Start the ranks and wait until the last has ended. Returns the exit status.

        0 if the last process of every rank ended with 0, 128 + n after signal n, else 1.

        Raises:
            LaunchError: another launcher runs these places or shapes the run otherwise, or no store answers.
        """
        earlier = {number: signal.signal(number, self._on_signal) for number in (*ENDING, *PASSED_ON)}
        try:
            self._claim()
            for local_rank in range(self._plan.local):
                self._start(local_rank)
            while self._ranks:
                self._wait()
            self._finish()
        finally:
            for rank in self._ranks.values():
                rank.send(signal.SIGKILL)
            self._stores.close()
            for number, handler in earlier.items():
                signal.signal(number, handler)
        if self._status is not None:
            return self._status
        return int(any(self._ended.values()))

    # -- places ------------------------------------------------------------------------------------------------------

    def _claim(self) -> None:
        """Take this machine's places, in every store that answers."""
        plan = self._plan
        own = f"{socket.gethostname()} (process {os.getpid()}, {secrets.token_hex(4)})"
        shape = f"{plan.nodes} machines of {plan.local} ranks"

        def claim(store: Store, prefix: str) -> tuple[str, str]:
            found = store.compare_set(f"{prefix}shape", "", shape).decode()
            holder = store.compare_set(f"{prefix}launcher/{plan.node}", "", own).decode() if found == shape else own
            return found, holder

        deadline, answers = time.monotonic() + MEETING, self._stores.ask(claim)
        # Ranks use the first store that answers: where some began before it does, they would begin a run of their own.
        while self._stores.addresses[0] not in answers and not self._stores.read("record"):
            if time.monotonic() > deadline:
                host, port = plan.stores[0]
                raise LaunchError(
                    f"no store answers at {host}:{port} within {MEETING:g} s: is the launcher of node 0 running, and can this "
                    f"machine reach it?"
                )
            time.sleep(EVERY)
            answers = self._stores.ask(claim)
        for found, holder in answers.values():
            if found != shape:
                raise LaunchError(
                    f"this is node {plan.node} of {shape}, but the run {plan.run!r} is one of {found}: give every launcher the "
                    f"same --nnodes and --nproc-per-node, or other runs another --stores"
                )
            if holder != own and self._beats_still():
                raise LaunchError(
                    f"node {plan.node} of the run {plan.run!r} is run by {holder} already: two launchers for the same places. "
                    f"Give this one another --node-rank, or end that one first"
                )
        self._stores.state("shape", shape)
        self._stores.state(f"launcher/{plan.node}", own)
        for node in range(plan.nodes):
            for key in ("launcher-beat", "finished"):
                self._stores.watch(f"{key}/{node}")
        self._stores.watch("failed")
        self._stores.watch("record")

    def _beats_still(self) -> bool:
        """Whether another launcher of this machine's places is alive."""
        key = f"launcher-beat/{self._plan.node}"
        before = self._stores.read(key)
        time.sleep(STILL)
        return self._stores.read(key) != before

    def _is_elastic(self, slot: int) -> bool:
        """Whether the process of this place was in an elastic run; once one was, all are, whatever the stores can say."""

        def knows(store: Store, prefix: str) -> bool:
            return any(store.check([prefix + key]) for key in ("record", f"slot/{slot}"))

        self._elastic = self._elastic or bool(self._stores.seen("record")) or any(self._stores.ask(knows).values())
        return self._elastic

    def _start(self, local_rank: int) -> None:
        slot = self._plan.node * self._plan.local + local_rank
        # The stores know of processes that an earlier launcher has started; one that is new does not know of ours.
        known = [int(text) + 1 for text in self._stores.read(f"incarnation/{slot}").values()]
        before = self._ranks.get(local_rank)
        incarnation = max([before.incarnation + 1 if before is not None else 0, *known])
        self._stores.state(f"incarnation/{slot}", str(incarnation))
        self._ranks[local_rank] = RankProcess(self._plan, local_rank, incarnation, self._in_order(), self._events.put)

    def _in_order(self) -> list[Address]:
        """The stores, those first that know most of the run: one that is back, and empty, must not begin another."""
        records = {address: read_record(text) for address, text in self._stores.read("record").items()}
        epochs = {address: record.epoch for address, record in records.items() if record is not None}
        return sorted(self._stores.addresses, key=lambda address: -epochs.get(address, -1))

    # -- events ------------------------------------------------------------------------------------------------------

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._events.put(number)

    def _wait(self) -> None:
        """Until something happens, or the next heartbeat is due."""
        try:
            event = self._events.get(timeout=EVERY)
        except Empty:
            event = None
        if isinstance(event, RankProcess):
            self._after(event)
        elif event is not None:
            self._signalled(event)
        self._beat()
        if self._status is None and (why := self._stores.seen("failed")):
            self._end(1, signal.SIGTERM, f"{why[0]}: the ranks of this machine end too")
        if self._ranks and time.monotonic() > self._kill_at:
            self._kill(f"not ended within {GRACE:g} s")

    def _beat(self) -> None:
        self._beats += 1
        self._stores.beat(f"launcher-beat/{self._plan.node}", str(self._beats))
        for rank in self._ranks.values():
            if rank.lives():
                self._stores.beat(f"beat/{rank.uid}", str(self._beats))

    def _signalled(self, number: int) -> None:
        if number in PASSED_ON:
            self._send(number)
        elif self._status is None:
            self._end(128 + number, number, f"{signal.Signals(number).name}: it is passed on to the ranks")
        elif self._ranks:
            self._kill(f"a second signal, {signal.Signals(number).name}")

    def _after(self, rank: RankProcess) -> None:
        """A process has ended."""
        code, local_rank = rank.code or 0, rank.local_rank
        reason = words(code)
        self._stores.state(f"dead/{rank.uid}", reason)
        over = 0 in self._ended.values()
        self._ended[local_rank] = code
        if self._status is None and code:
            who = f"rank {rank.slot} (process {rank.pid}) ended with {reason}"
            if not self._is_elastic(rank.slot):
                self._stores.state("failed", f"rank {rank.slot} on {socket.gethostname()} ended with {reason}")
                self._end(1, signal.SIGTERM, f"{who}: all end, since none has called fusedfog.init(elastic=True)")
            elif over:
                _say(f"{who}; it is not started again, as others have come to the end of the program")
            elif self._restarts[local_rank] >= self._plan.max_restarts:
                _say(f"{who}; it is not started again, after {self._restarts[local_rank]} restarts (--max-restarts)")
            else:
                self._restarts[local_rank] += 1
                self._start(local_rank)
                count = f"restart {self._restarts[local_rank]} of {self._plan.max_restarts}"
                _say(f"{who}; it is started again as member {self._ranks[local_rank].uid} ({count})")
                return
        del self._ranks[local_rank]

    def _end(self, status: int, number: int, why: str) -> None:
        """Have all processes end, and nothing be started any more."""
        _say(why)
        self._status = status
        self._kill_at = time.monotonic() + GRACE
        self._send(number)

    def _kill(self, why: str) -> None:
        _say(f"{name_ranks(rank.slot for rank in self._ranks.values())}: {why}: SIGKILL")
        self._kill_at = float("inf")
        self._send(signal.SIGKILL)

    def _send(self, number: int) -> None:
        for rank in self._ranks.values():
            rank.send(number)

    def _finish(self) -> None:
        """Say that this machine is through; a store that others still use stays until they are, or are gone too.

        After a failure they need it to learn of that, and get some seconds.
        """
        self._stores.state(f"finished/{self._plan.node}", "1")
        if self._plan.node >= len(self._plan.stores):
            return
        failed, until = self._status, time.monotonic() + STILL
        changed = dict.fromkeys(set(range(self._plan.nodes)) - {self._plan.node}, (time.monotonic(), [""]))
        while changed and self._status == failed and (failed is None or time.monotonic() < until):
            self._wait()
            for node, (since, known) in list(changed.items()):
                beats = self._stores.seen(f"launcher-beat/{node}")
                if self._stores.seen(f"finished/{node}") or (beats == known and time.monotonic() > since + GRACE):
                    del changed[node]
                elif beats != known:
                    changed[node] = time.monotonic(), beats


def _say(text: str) -> None:
    print(f"fusedfog run: {text}", file=sys.stderr, flush=True)
