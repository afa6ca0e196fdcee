"""Mixing across machines at the cost of one model per machine: W_machine (x) J_local on a two-dimensional mesh.

A bucket's exchange is `two_level.exchange`'s, in three phases: collected inside the machine, mixed across machines, handed round
inside. So a machine sends its model once to each neighbour machine. Where the ranks of a machine average gradients, they
have the same parameters, and there is nothing to collect.

The phases of one exchange depend on each other. On gloo a single thread per optimizer chains them, bucket after bucket in
the order that all ranks share, so the training thread never waits. On NCCL they are queued at once, on two side streams in
turn and on a communicator for each phase: while one bucket is between machines, the next is collected inside. (A
communicator keeps the order in which its operations were queued, so one for both phases inside would make the next
bucket's first wait for this one's last.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import cycle

import torch
from torch import Tensor

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.failures import LOOK_EVERY
from fusedfog.comm.inside import ByMessages, ThroughMemory
from fusedfog.comm.profiling import span
from fusedfog.comm.registry import communicator_for
from fusedfog.comm.transfer import Transfer
from fusedfog.comm.two_level import Inside, MeshLine, Path, Refuse, exchange, pass_on, pieces_of, shards_of
from fusedfog.gossip.buckets import BucketState
from fusedfog.gossip.delivery import ExchangeStats, InboxTensors, OneMean, Rounds
from fusedfog.gossip.quarantine import Quarantine
from fusedfog.kernels import device
from fusedfog.topology import Round, Topology


class Chain(Transfer):
    """An exchange of several phases, carried out by a thread (gloo) or queued on a side stream (NCCL)."""

    def __init__(
        self,
        communicator: Communicator,
        label: str,
        phases: Iterator[Transfer],
        on: ThreadPoolExecutor | torch.cuda.Stream,
    ) -> None:
        super().__init__(communicator, label)
        self._device = communicator.device
        self._task: Future[None] | None = None
        self._event: torch.cuda.Event | None = None
        self._broken: Transfer | None = None
        if isinstance(on, ThreadPoolExecutor):
            self._task = on.submit(self._carry_out, phases)
        else:
            on.wait_stream(torch.cuda.current_stream(communicator.device))
            with torch.cuda.stream(on):
                try:
                    self._carry_out(phases)
                except RuntimeError as error:
                    # Only a step that needs this message may complain.
                    self.failure = error
                self._event = on.record_event()

    def done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        if self._task is not None:
            return self._task.done()
        return self.failure is not None or self._event is None or self._event.query()

    def finish(self) -> None:
        """As `wait`; what failed is kept."""
        with contextlib.suppress(RuntimeError):
            self.wait()

    def wait(self) -> None:
        """Wait for the last phase; raises what failed in any. On a GPU it is the current stream that waits."""
        if self._task is not None:
            self._await_task(self._task)
        elif self.failure is not None:
            raise self.failure
        elif self._event is not None:
            torch.cuda.current_stream(self._device).wait_event(self._event)

    def _await_task(self, task: Future[None]) -> None:
        while not wait([task], LOOK_EVERY).done:
            # A rank of another line, which this one does not wait for, may have ended all that the line waits for.
            if self.communicator.ended is not None:
                raise self.communicator.ended
        if self._broken is not None:
            self._broken.wait()  # Raises, and now it is known that somebody needs it.
        task.result()

    @torch.no_grad()
    def _carry_out(self, phases: Iterator[Transfer]) -> None:
        for transfer in phases:
            transfer.finish()
            if transfer.failure is not None:
                self._broken = transfer
                raise transfer.failure


class Hierarchy:
    """One rank's place on the mesh: its communicators inside the machine, and to its counterparts across machines.

    Args:
        lines: across machines, and inside (`two_level`).
        equal: the ranks of a machine have the same parameters, as they average gradients.

    Attributes:
        machine, machines, local, locals: this rank's coordinates on the mesh and the mesh's shape.
        gradients: the communicator on which they do; None if a machine has one rank, or they do not.
        bytes_inside, bytes_across: sent so far.
        refuse: see `two_level.exchange`.
    """

    def __init__(
        self,
        lines: tuple[MeshLine, MeshLine],
        place: torch.device,
        comm_sms: int | None = None,
        *,
        equal: bool = False,
    ) -> None:
        self._lines = across, inside = lines
        self.machine, self.machines = across.place, across.size
        self.local, self.locals = inside.place, inside.size
        on_gpu = device.on_gpu(place)
        # On NCCL operations of one communicator run in the order in which they were queued, and a thread beside the training
        # one must not share its: gradients have a communicator of their own.
        own = communicator_for(inside.view, place, comm_sms, 2) if equal and inside.size > 1 else None
        self.equal, self.gradients = equal, own
        self._across = _open(across, place, comm_sms)
        self._inside, self._back = None if equal else _open(inside, place, comm_sms), None
        self._memory = self._through_memory(inside)
        if self._memory is None:
            self._back = self._inside
            if on_gpu or equal:
                self._back = _open(inside, place, comm_sms, number=1 if on_gpu else 0)
        self._pump = None if on_gpu else ThreadPoolExecutor(1, "fusedfog-hierarchy")
        self._streams = cycle([torch.cuda.Stream(place) for _ in range(2)] if on_gpu else [])
        self.bytes_inside = self.bytes_across = 0
        self.refuse: Refuse | None = None

    def _through_memory(self, inside: MeshLine) -> ThroughMemory | None:
        """The way through the machine's memory, if its ranks have one."""
        communicator = self.gradients if self._inside is None else self._inside[0]
        shared = communicator.shared_buffers() if communicator is not None else None
        if communicator is None or shared is None:
            return None
        return ThroughMemory(inside, communicator, shared, collects=not self.equal)

    def warm_up(self, rounds: Iterable[Round]) -> None:
        """Open NCCL's connections inside the machine, and across for these of the machine's rounds."""
        across, inside = self._lines
        others = [inside.members[place] for place in inside.others]
        for end in (self._inside, self._back):
            if end is not None:
                end[0].warm_up([(others, others)])
        if self._across is not None:
            members = across.members
            self._across[0].warm_up(
                ([members[machine] for machine in round_.send], [members[machine] for machine in round_.recv])
                for round_ in rounds
            )

    def start(
        self, communicator: Communicator, pairs: Sequence[tuple[Tensor, Tensor]], round_: Round, number: int, label: str
    ) -> Chain:
        """Start mixing each (sent, inbox) pair of flat tensors: inbox will hold sum_b W[a, b] mean_b. See `Transfer`.

        Args:
            round_: the machine's round of the topology.
            number: tells this exchange's tags from those in flight beside it; the pairs take as many numbers.
        """
        for sent, _ in pairs:
            own = shards_of(sent, self.locals)[self.local].nbytes
            if self.locals > 1:
                self.bytes_inside += (1 if self.equal else 2) * (sent.nbytes - own)
            self.bytes_across += len(round_.send) * own
        return self._chain(communicator, self._all_phases(pairs, round_, number, label), label)

    def pass_on(
        self,
        communicator: Communicator,
        sent: Sequence[Tensor],
        received: Mapping[int, Sequence[Tensor]],
        groups: int,
        round_: Round,
        number: int,
        label: str,
    ) -> Chain:
        """Start bringing what neighbour machines send to all ranks of this one; see `two_level.pass_on`.

        Args:
            number: as for `start`; takes as many numbers as one rank is sent tensors.
        """
        own = sum(pieces_of(tensor, self.locals, groups)[self.local].nbytes for tensor in sent)
        self.bytes_inside += len(received) * own * (self.locals - 1)
        self.bytes_across += len(round_.send) * own
        path, inside = _path(self._across, number), self._way_inside(number)
        phases = pass_on(sent, received, groups, round_, self._lines[0], path, inside, label)
        return self._chain(communicator, phases, label)

    def _chain(self, communicator: Communicator, phases: Iterator[Transfer], label: str) -> Chain:
        return Chain(communicator, label, phases, self._pump if self._pump is not None else next(self._streams))

    def _all_phases(
        self, pairs: Sequence[tuple[Tensor, Tensor]], round_: Round, number: int, label: str
    ) -> Iterator[Transfer]:
        for i, (sent, inbox) in enumerate(pairs):
            path, inside = _path(self._across, number + i), self._way_inside(number + i)
            yield from exchange(sent, inbox, round_, self._lines[0], path, inside, label, self.refuse)

    def _way_inside(self, number: int) -> Inside:
        """The way inside of exchange `number`: on gloo both phases go over one communicator, with tags of their own."""
        if self._memory is not None:
            return self._memory
        return ByMessages(self._lines[1], _path(self._inside, 2 * number), _path(self._back, 2 * number + 1))


def _open(
    line: MeshLine, place: torch.device, comm_sms: int | None, number: int = 0
) -> tuple[Communicator, int] | None:
    """A communicator along a line with a channel of this optimizer's own; None where this rank is alone."""
    if line.size == 1:
        return None
    communicator = communicator_for(line.view, place, comm_sms, number)
    return communicator, communicator.open_channel()


def _path(end: tuple[Communicator, int] | None, number: int) -> Path | None:
    if end is None:
        return None
    communicator, channel = end
    return Path(communicator, communicator.tag(channel, number))


class ByMachine(OneMean):
    """See `Delivery`; rounds are between machines, and what arrives is mixed already.

    Attributes:
        hierarchy: this rank's place on the mesh.
    """

    def __init__(
        self,
        communicator: Communicator,
        hierarchy: Hierarchy,
        inboxes: InboxTensors,
        stats: ExchangeStats,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.communicator, self.hierarchy, self.inboxes, self.stats = communicator, hierarchy, inboxes, stats
        if quarantine is not None:
            ranks = communicator.view.ranks
            hierarchy.refuse = lambda bad: quarantine.refuse(map(ranks.index, bad))
        self._rounds = Rounds(hierarchy.machine)

    def use_topology(self, topology: Topology | None) -> None:
        """See `Delivery`."""
        self._rounds.use(topology)

    def open_connections(self) -> None:
        """See `Delivery`."""
        self.hierarchy.warm_up(self._rounds.ahead())

    def fill(self, bucket: BucketState, exchange: int, label: str) -> Transfer:
        """Start a bucket's three phases."""
        round_, here, messages = self._rounds.of(exchange), bucket.whole, self.inboxes.messages
        inbox = self.inboxes.inbox(bucket.segment, 1)
        pairs = [
            (bucket.segment.tensor(name)[here], mixed[here])
            for name, (mixed,) in zip(messages, inbox.tensors, strict=True)
        ]
        number = (2 * bucket.number + exchange % 2) * len(messages)
        before = self.hierarchy.bytes_inside + self.hierarchy.bytes_across
        bucket.sources = [f"machine {machine}" for machine in round_.recv]
        with span("exchange", (bucket.number,), to=(f"machine {m}" for m in round_.send), sources=bucket.sources):
            transfer = self.hierarchy.start(self.communicator, pairs, round_, number, label)
        moved = self.hierarchy.bytes_inside + self.hierarchy.bytes_across - before
        self.stats.bytes_sent += moved
        self.stats.bytes_received += moved
        self.stats.bytes_across = self.hierarchy.bytes_across
        # mixed = x + 1 (inbox - x)
        bucket.inbox = replace(inbox, weights=(1.0,))
        return transfer
