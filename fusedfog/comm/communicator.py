"""Point-to-point exchange of buckets over torch.distributed, NCCL and gloo behind one interface.

A `Communicator` is a dedicated process group of a set of ranks, which optimizers share, each with a channel number of its own;
plain-tensor operations have another one on CPUs, and share the optimizers' on GPUs. `Communicator.start` posts all receives and
sends of one bucket and returns a `Transfer`; `Transfer.wait` makes the data usable: on gloo it blocks the host, on NCCL only
the current stream. In an elastic run NCCL's host waits too, so that no pass is queued behind what may never come.

Rules that keep this free of deadlock:
 - Every rank starts the same buckets in the same order, from one thread. NCCL matches by order (one group call a bucket,
   no tags); gloo matches by tag.
 - Receives are posted before sends: a gloo send completes only when its receive is posted.
 - A gloo work is waited for exactly once (a second wait never returns) and is never dropped while pending (that breaks its
   connection for everyone): what its owner abandons, the communicator keeps until it has completed. A wait for a NCCL work only
   orders the stream that is current, so every stream that uses a result waits for it again.
"""

from __future__ import annotations

import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import ClassVar, TypeVar

import torch
import torch.distributed as dist

from fusedfog.comm import calls
from fusedfog.comm.agreement import confer, next_agreement
from fusedfog.comm.batches import batches
from fusedfog.comm.elastic import nccl
from fusedfog.comm.elastic.epoch import claim_connections
from fusedfog.comm.failures import Origin, origin_of, set_origin
from fusedfog.comm.group import GroupView, check_backend, group_timeout
from fusedfog.comm.looking import look_after
from fusedfog.comm.membership import Membership
from fusedfog.comm.shared_buffers import SharedBuffers
from fusedfog.comm.shared_opening import open_shared
from fusedfog.comm.sockets import Sockets
from fusedfog.comm.subgroup import check_one_rank_per_gpu, dedicated_group, nccl_options
from fusedfog.comm.transfer import Peers, PeerTensor, Transfer, copy_of, unrecorded
from fusedfog.comm.waiter import Task, Waiter, await_task, leak
from fusedfog.comm.watchdog import Watchdog
from fusedfog.comm.whereabouts import State
from fusedfog.errors import ExchangeError, PeerTimeout, RankLeft
from fusedfog.kernels import device

R = TypeVar("R")

LAST_MOMENT = 5.0
"""Seconds that messages in flight get when the process ends, or its part in training."""

_TO_COME = 1.0
"""Seconds in which what members that begin the same step have sent each other comes."""

_TO_WAKE = 0.2
"""Seconds in which a thread wakes whose connections are shut down; one that waits for half a message does not."""


class Communicator:
    """The dedicated process group of one set of ranks.

    Attributes:
        view: this rank's place among them.
        device: where its tensors are.
        on_gpu: whether works are queued on streams, as NCCL's.
        follows: whether the host nevertheless waits until they are over; in elastic runs.
        timeout: how long a wait may last.
        name: a store key prefix of its own, the same on all of its ranks.
        membership: who of these ranks is still there.
    """

    _all: ClassVar[weakref.WeakSet[Communicator]] = weakref.WeakSet()
    follows: bool = False
    _lost: Exception | None = None

    def __init__(self, view: GroupView, place: torch.device, comm_sms: int | None = None) -> None:
        assert view.group is not None
        self.view, self.device = view, place
        self.on_gpu = device.on_gpu(place)
        self.follows = self.on_gpu and nccl.backend() is not None
        check_backend(view, place)
        self.timeout = group_timeout(view, place)
        calls.enter_world(self.timeout.total_seconds())
        if self.on_gpu:
            check_one_rank_per_gpu(view, place, self.timeout)
        options = nccl_options(view, place, self.timeout, comm_sms) if self.on_gpu else None
        # In an elastic run, the default group is gone with its epoch, as this communicator is.
        claimed = claim_connections(view.size) if not self.follows else None
        self._sockets, self._group = claimed or Sockets(), view.group if claimed is not None else None
        if self._group is None:
            self._group = dedicated_group(view.ranks, self.timeout, options, nccl.backend() if self.on_gpu else None)
            self._sockets.take_new()
        self._ended: Exception | None = None
        self.told: Origin | None = None
        self.name = next_agreement(view)
        self.membership = Membership(view, self.name, self.timeout)
        self._channels = 0 if claimed is None else 1  # Tags of channel 0 are those that users give.
        self._world = dist.distributed_c10d._get_default_group()
        self._all.add(self)
        self._abandoned: list[Transfer] = []
        self._started: weakref.WeakSet[Transfer] = weakref.WeakSet()
        self._warm: tuple[set[int], set[int]] = (set(), set())
        self._shared: SharedBuffers | None = None
        self._shared_asked = False
        self._waiter = Waiter()
        self._watchdog = Watchdog(self) if self.on_gpu else None
        calls.remember_addresses(view)
        if self.follows:
            self.run(partial(nccl.connect, self.group, place), "opening the communicator, with all ranks")
        # The first operation of an NCCL group must involve all of its ranks; on gloo this meets every peer once.
        ports = torch.zeros(view.size, dtype=torch.int64, device=place)
        ports[view.rank] = self._sockets.port
        self.collect(partial(dist.all_reduce, ports, async_op=True), "opening the communicator, with all ranks")
        if not self.on_gpu:
            self._sockets.keep(ports.tolist())
        calls.reach(view)
        calls.listen(self.name, weakref.WeakMethod(self.hear))

    @property
    def ended(self) -> Exception | None:
        """Why nothing can be exchanged any more, once that is so."""
        if self._ended is None and self.told is not None:
            self._ended = calls.given_up(self.view, self.told)
        return self._ended

    @property
    def broken(self) -> Exception | None:
        """See `Owner`: `ended`, or the first failure, after which NCCL counts as complete what has not come."""
        return self.ended or self._lost

    @property
    def group(self) -> dist.ProcessGroup:
        """The dedicated group, created with the parent's timeout; raises `ended`, once that is there."""
        if self.ended is not None or self._group is None:
            raise self.ended or RuntimeError("the process is ending")
        return self._group

    def collect(self, operation: Callable[..., dist.Work | None], what: str) -> None:
        """Make a collective operation, given the `group` and started with `async_op`, and wait for it.

        Args:
            what: for errors, with whom it is.

        Raises:
            PeerTimeout, ExchangeError: a rank did not come, or has gone.
        """
        transfer = Transfer(self, "")
        with unrecorded():
            transfer.add(operation, what)
        transfer.wait()

    def run(self, function: Callable[[], R], what: str) -> R:
        """What `function` returns, which makes blocking operations with all ranks, none on a GPU if `follows`; as `collect`."""
        _ = self.group
        try:
            if self.on_gpu and not self.follows:
                return function()
            task = Task(function)
            origin = await_task(task, calls.vigil(self.name, self.view.ranks), self.view.ranks)
            if origin is None:
                return task.result()
            error: Exception = RuntimeError(f"rank {origin.rank} {origin.words}")
            found = self.failure(error, what)
            set_origin(found, self.view, origin)
        except (PeerTimeout, ExchangeError):
            raise
        except RuntimeError as error:
            if not calls.is_network_error(error):
                raise
            found = self.failure(error, what)
        found = self.conclude(found, ())
        raise found

    def meet(self, call: str) -> None:
        """Return once every rank has come to this call, with nothing posted to the group; raises as `confer`."""
        _ = self.group  # Raises why the communicator has ended, if it has.
        confer(self.view, next_agreement(self.view), None, lambda _: None, self.timeout, call)

    def shared_buffers(self) -> SharedBuffers | None:
        """The buffers that these ranks share; None where they are not on one host, or cannot, and on GPUs.

        The first call is collective.
        """
        if not self._shared_asked and not self.on_gpu and self.ended is None:
            self._shared = open_shared(self.view, self.timeout)
            if self._shared is not None:
                weakref.finalize(self, self._shared.close).atexit = False
        self._shared_asked = True
        return self._shared

    def open_channel(self) -> int:
        """A number that keeps one user's tags apart from the others'; ranks open channels in the same order."""
        self._channels += 1
        return self._channels - 1

    def tag(self, channel: int, number: int) -> int:
        """The tag of a channel's message `number`; channels share none, and numbers repeat only after 2^20 messages."""
        return (channel % (1 << 11)) << 20 | number % (1 << 20)

    def warm_up(self, rounds: Iterable[tuple[Iterable[int], Iterable[int]]]) -> None:
        """Open NCCL's connections for rounds of (ranks to send to, ranks to receive from); gloo needs none of this.

        An edge is opened in the first round that has it, so that both its ends do so together, and once in the life
        of a communicator.
        """
        if not self.on_gpu:
            return
        token = torch.zeros(1, device=self.device)
        met_by_sending, met_by_receiving = self._warm
        for to, sources in rounds:
            sends = [(peer, token) for peer in to if peer not in met_by_sending]
            recvs = [(peer, torch.empty_like(token)) for peer in sources if peer not in met_by_receiving]
            met_by_sending.update(peer for peer, _ in sends)
            met_by_receiving.update(peer for peer, _ in recvs)
            if sends or recvs:
                self.start(sends, recvs, tag=0, label="warm-up").wait()

    def start(self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor], *, tag: int, label: str) -> Transfer:
        """Post one bucket's receives and sends; failures surface in `Transfer.wait`.

        Args:
            sends, recvs: (peer, contiguous tensor) each; the tensors must stay untouched until `wait` has returned.
            tag: tells messages between the same two ranks apart (gloo); a peer's further tensors take the tags after it.
            label: what this is, for errors: "step 12, bucket 3".
        """
        self._retire()
        transfer = Transfer(self, label)
        if self.ended is not None:
            transfer.failure = self.ended
            return transfer
        transfer.keep_alive = [tensor for _, tensor in (*sends, *recvs)]
        if self.on_gpu:
            self._start_grouped(transfer, sends, recvs)
        else:
            self._start_tagged(transfer, sends, recvs, tag)
            if transfer.pending:
                self.begin_waiting(transfer)
        return transfer

    def begin_waiting(self, transfer: Transfer) -> None:
        """Have the waiter wait for a transfer, once."""
        if not transfer.queued:
            transfer.queued = True
            self._waiter.add(transfer)

    def look_after(self, transfer: Transfer) -> None:
        """See `looking.look_after`."""
        look_after(self, transfer)

    def _start_tagged(
        self, transfer: Transfer, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor], tag: int
    ) -> None:
        for post, end, part in ((dist.irecv, "group_src", recvs), (dist.isend, "group_dst", sends)):
            sent_before: Counter[int] = Counter()
            for peer, tensor in part:
                with_whom = Peers((peer,)) if part is recvs else Peers((), (peer,))
                try:
                    with unrecorded():
                        work = post(tensor, group=self.group, tag=tag + sent_before[peer], **{end: peer})
                except RuntimeError as error:
                    # The peer may have finished and exited; only a step that needs this message may complain.
                    transfer.fail(error, with_whom)
                    return
                assert work is not None
                sent_before[peer] += 1
                transfer.pending.append((work, with_whom))

    def _start_grouped(self, transfer: Transfer, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> None:
        # torch asks for the tensors' device to be the current one around a batch.
        elsewhere = self.device.type == "cuda" and self.device.index != torch.cuda.current_device()
        here: AbstractContextManager[object] = torch.cuda.device(self.device) if elsewhere else nullcontext()
        with here:
            for some_sends, some_recvs in batches(self.view, sends, recvs):
                ops = [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for peer, tensor in some_recvs]
                ops += [
                    dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for peer, tensor in some_sends
                ]
                peers = Peers(tuple(peer for peer, _ in some_recvs), tuple(peer for peer, _ in some_sends))
                try:
                    transfer.pending += [(work, peers) for work in dist.batch_isend_irecv(ops)]
                except RuntimeError as error:
                    transfer.fail(error, peers)
                    break
        assert self._watchdog is not None
        self._watchdog.watch(transfer.label, transfer.pending)

    def register(self, transfer: Transfer) -> None:
        """Know of a transfer, for when the communicator is closed."""
        self._started.add(transfer)

    def keep(self, transfer: Transfer) -> None:
        """Keep an abandoned message's works alive until they have completed."""
        if transfer.pending and transfer not in self._abandoned:
            self._abandoned.append(transfer)

    def failure(self, error: Exception, what: str) -> Exception:
        """See `Membership.failure`."""
        found = self.membership.failure(error, what)
        self._lost = self._lost or found
        return found

    def conclude(self, failure: Exception, first: Iterable[int]) -> Exception:
        """End the communicator for this failure, and tell all of its ranks where it began; what is to be raised.

        Args:
            first: group ranks that were waited for.
        """
        if self.ended is not None:
            if self.told is not None and self._group is not None and self.ends_at_once:
                self.close(0.0)
            return self.ended if self.told is not None else failure
        if isinstance(failure, (PeerTimeout, ExchangeError)) and not isinstance(failure, RankLeft):
            late, origin = isinstance(failure, PeerTimeout), origin_of(failure)
            if origin is None:
                own = State(calls.current_call(), failed=True, late=late)
                _, origin = calls.ask_why(self.view, self.name, own, [self.view.ranks[peer] for peer in first])
                set_origin(failure, self.view, origin)
            said = origin or Origin(-1, f"rank {self.view.rank} has given up: {failure}", late)
            calls.tell(self.view, self.name, said)
            for other in self._ending_with_this(said):
                calls.tell(other.view, other.name, said)
                other.end(failure, 0.0)
        elif isinstance(failure, RankLeft):
            # Its neighbours may be in the middle of a message of this rank's, which gloo lets wait for ever.
            calls.note_ended(self.name, Origin(self.view.ranks[failure.ranks[0]], "has left"))
        self.end(failure, 0.0)
        return failure

    def _ending_with_this(self, origin: Origin) -> list[Communicator]:
        """Others that cannot go on: of the same dead rank, or among ranks of these, as those of a mesh."""
        same_world = [one for one in self._all if one._world is self._world]  # A group that is destroyed has no ranks.
        living = [one for one in same_world if one is not self and one.ended is None]
        dead = [self, *(one for one in living if origin.rank in one.view.ranks)]
        return [one for one in living if one in dead or any(set(one.view.ranks) <= set(big.view.ranks) for big in dead)]

    def hear(self, origin: Origin) -> None:
        """Another rank has given this communicator up: whoever waits in it wakes, and the next call raises; for any thread."""
        if self.told is None and self._ended is None:
            self.told = origin
            for transfer in copy_of(self._started):
                if transfer.queued and not transfer.over.is_set():
                    transfer.failure = self.ended
                    transfer.over.set()

    @property
    def ends_at_once(self) -> bool:
        """Whether `close` waits for nobody. Destroying an NCCL group may wait for its peers; in elastic runs it is aborted."""
        return not self.on_gpu or self.follows

    def end(self, reason: Exception, patience: float) -> None:
        """Exchange nothing more, for this reason; what is in flight gets `patience` seconds."""
        if self._ended is None:
            self._ended = reason
            if self.ends_at_once:  # Elsewhere the watchdog reads the notes.
                self.close(patience)

    def close(self, patience: float = LAST_MOMENT) -> None:
        """Let go of works, tensors and group while Python still runs; for the end of the process, or of this rank's part.

        A gloo thread that drops a tensor while the interpreter shuts down aborts the process, and optimizers at module
        level live until then. What is in flight gets `patience` seconds to complete, for the sake of peers that need it.
        """
        deadline = time.monotonic() + patience
        started = list(self._started)
        for transfer in started:
            if transfer.queued:
                transfer.over.wait(max(0.0, deadline - time.monotonic()))
        if self.follows:
            self._abort(started, deadline)
        self._sockets.shut_down()
        # A transfer may be over, since a rank has given up, while a thread still waits for half of its message.
        stuck = not self._waiter.stop(_TO_WAKE) or any(one.pending and not one.over.is_set() for one in started)
        stuck = stuck or any(one.begun and not one.returned for one in started)
        if stuck and self._group is not None and not self.on_gpu:
            leak(self._group)
        for transfer in started:
            transfer.pending.clear()
            transfer.keep_alive.clear()
        self._abandoned.clear()
        if self._shared is not None:
            self._shared.close()
        if self._group is not self.view.group and self._group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(self._group)
        self._group = None

    def _abort(self, started: Sequence[Transfer], deadline: float) -> None:
        """End all NCCL operations of this epoch; what is in flight and not lost may come before."""
        deadline = max(deadline, time.monotonic() + _TO_COME)
        for transfer in started if self.broken is None else ():
            transfer.over_within(deadline - time.monotonic())
        self._ended = self._ended or RuntimeError("the epoch is over")
        nccl.abort_all([work for transfer in started for work, _ in transfer.pending])
        self._group = None  # It goes with the epoch.

    def _retire(self) -> None:
        # A failed transfer keeps its other works for good: its connections are broken, but dropping them breaks more.
        self._abandoned = [one for one in self._abandoned if one.failure is not None or not one.done()]
