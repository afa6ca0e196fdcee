"""Messages in flight: point-to-point exchange of buckets over torch.distributed, NCCL and gloo behind one interface.

A `Link` is the one dedicated process group of a set of ranks; optimizers and plain-tensor operations share it, each with
a channel number of its own. `Link.start` posts all receives and sends of one bucket and returns a `Message`;
`Message.wait` makes the data usable: on gloo it blocks the host, on NCCL only the current stream.

Rules that keep this free of deadlock:
 - Every rank starts the same buckets in the same order, from one thread. NCCL matches by order (one group call a bucket,
   no tags); gloo matches by tag.
 - Receives are posted before sends: a gloo send completes only when its receive is posted.
 - A gloo work is waited for exactly once (a second wait never returns) and is never dropped while pending (that breaks its
   connection for everyone): what its owner abandons, the link keeps until it has completed. A wait for a NCCL work only
   orders the stream that is current, so every stream that uses a result waits for it again.
"""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._autograd import _enable_record_function

from fusedfog.errors import ExchangeError, PeerTimeout, RankLeft
from fusedfog.groups import (
    check_backend,
    check_one_rank_per_gpu,
    dedicated_group,
    group_timeout,
    nccl_options,
    next_agreement,
)
from fusedfog.kernels import device
from fusedfog.watchdog import Watchdog
from fusedfog.world import World

_LAST_MOMENT = 5.0
"""Seconds that messages in flight get when the process ends, or its part in training."""

_LARGEST_BATCH = 256
"""Operations in one NCCL group call; with more it can hang (pytorch#174288)."""

Parcel = tuple[int, Tensor]
"""A peer's group rank, and the contiguous tensor to send to it or to fill from it."""


@contextlib.contextmanager
def unrecorded() -> Iterator[None]:
    """Inside, torch.profiler sees no operations; for starting works that may outlive its record.

    A gloo work reports its end to the profiler it was started under. If that has gone, it writes into freed memory and
    the process dies (torch 2.13, and with no more than isend in a profile and its wait after it).
    """
    _enable_record_function(False)
    try:
        yield
    finally:
        _enable_record_function(True)


def is_timeout(error: Exception) -> bool:
    """Whether torch says that a peer did not come in time: gloo "Timed out", the store "wait timeout", NCCL either."""
    return "imed out" in str(error) or "wait timeout" in str(error)


class Message:
    """One bucket's sends and receives in flight, or how they failed."""

    def __init__(self, link: Link, label: str) -> None:
        self.link = link
        self.label = label
        self.pending: list[tuple[dist.Work, object]] = []
        self.keep_alive: list[Tensor] = []
        self.failure: Exception | None = None
        self.waiter: threading.Thread | None = None
        link._started.add(self)

    def done(self) -> bool:
        """Whether `wait` would return (or raise) at once; on gloo, asking for the first time starts a thread that finds out.

        A gloo work never says that it is complete (`is_completed` is false until it has been waited for), and a wait
        that times out closes the connection: so the only way to poll is to let somebody wait.
        """
        if self.failure is not None or not self.pending:
            return True
        if self.link.on_gpu:
            return all(work.is_completed() for work, _ in self.pending)
        if self.waiter is None:
            self.waiter = threading.Thread(target=self._await_works, daemon=True, name="fusedfog-waiter")
            self.waiter.start()
        return not self.waiter.is_alive()

    def wait(self) -> None:
        """Wait until all receives have arrived and all sends have left.

        On a GPU that is the current stream's wait. Another stream that uses the data, or overwrites what is sent, calls this
        again: the works are kept as long as the message.

        Raises:
            PeerTimeout: a peer's part did not come within the group's timeout.
            ExchangeError: the connection to a peer broke, now or when the message was started.
        """
        if self.waiter is not None:
            self.waiter.join()
        else:
            self._await_works()
        if self.failure is not None:
            self.link.keep(self)
            self.link.give_up(self.failure)
            raise self.failure
        if not self.link.on_gpu:
            self.keep_alive.clear()

    def _await_works(self) -> None:
        if self.link.on_gpu:
            self._order_stream()
            return
        deadline = time.monotonic() + self.link.timeout.total_seconds()
        while self.pending and self.failure is None:
            work, peers = self.pending[0]
            try:
                work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except RuntimeError as error:
                self.fail(error, peers)
            del self.pending[:1]  # Nothing, if the link was closed while this thread waited.

    def _order_stream(self) -> None:
        for work, peers in self.pending:
            try:
                work.wait()
            except RuntimeError as error:
                self.fail(error, peers)
                return

    def fail(self, error: Exception, peers: object) -> None:
        """Note why this message will never be complete; the wait that needs it raises."""
        self.failure = self.link.failure(error, f"{self.label}: {peers}")


@dataclass(frozen=True)
class _Peers:
    """Whom a batch is with, in words that are only put together for an error."""

    recvs: Sequence[Parcel]
    sends: Sequence[Parcel]

    def __str__(self) -> str:
        sources, targets = ([peer for peer, _ in parcels] for parcels in (self.recvs, self.sends))
        return f"receiving from ranks {sources}, sending to ranks {targets}"


class Link:
    """The dedicated process group of one set of ranks.

    Attributes:
        world: this rank's place among them.
        device: where its tensors are.
        on_gpu: whether works are queued on streams, as NCCL's.
        timeout: how long a wait may last.
        ended: why nothing can be exchanged any more, once that is so.
    """

    def __init__(self, world: World, place: torch.device, comm_sms: int | None = None) -> None:
        assert world.group is not None
        self.world, self.device = world, place
        self.on_gpu = device.on_gpu(place)
        check_backend(world, place)
        self.timeout = group_timeout(world, place)
        if self.on_gpu:
            check_one_rank_per_gpu(world, place, self.timeout)
        options = nccl_options(world, place, self.timeout, comm_sms) if self.on_gpu else None
        self._group: dist.ProcessGroup | None = dedicated_group(world.ranks, self.timeout, options)
        self.ended: Exception | None = None
        self._notes = next_agreement(world)
        self._channels = 0
        self._abandoned: list[Message] = []
        self._started: weakref.WeakSet[Message] = weakref.WeakSet()
        self._warm: tuple[set[int], set[int]] = (set(), set())
        self._watchdog = Watchdog(self) if self.on_gpu else None
        # The first operation of an NCCL group must involve all of its ranks; on gloo this meets every peer once.
        dist.all_reduce(torch.zeros(1, device=place), group=self.group)

    @property
    def name(self) -> str:
        """A store key prefix of this link's own, the same on all of its ranks."""
        return self._notes

    @property
    def group(self) -> dist.ProcessGroup:
        """The dedicated group, created with the parent's timeout; raises `ended`, once that is there."""
        if self._group is None or self.ended is not None:
            raise self.ended or RuntimeError("the process is ending")
        return self._group

    def open_channel(self) -> int:
        """A number that keeps one user's tags apart from the others'; ranks open channels in the same order."""
        self._channels += 1
        return self._channels - 1

    def tag(self, channel: int, number: int) -> int:
        """The tag of a channel's message `number`; channels share none, and numbers repeat only after 2^20 messages."""
        return (channel % (1 << 11)) << 20 | number % (1 << 20)

    def warm_up(self, rounds: Iterable[tuple[Iterable[int], Iterable[int]]]) -> None:
        """Open NCCL's connections for rounds of (ranks to send to, ranks to receive from); gloo needs none of this.

        An edge is opened in the first round that has it, so that both its ends do so together, and once in a link's life.
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

    def start(self, sends: Sequence[Parcel], recvs: Sequence[Parcel], *, tag: int, label: str) -> Message:
        """Post one bucket's receives and sends; failures surface in `Message.wait`.

        Args:
            sends, recvs: (peer, contiguous tensor) each; the tensors must stay untouched until `wait` has returned.
            tag: tells messages between the same two ranks apart (gloo); a peer's further parcels take the tags after it.
            label: what this is, for errors: "step 12, bucket 3".
        """
        self._retire()
        message = Message(self, label)
        if self.ended is not None:
            message.failure = self.ended
            return message
        message.keep_alive = [tensor for _, tensor in (*sends, *recvs)]
        if self.on_gpu:
            self._start_grouped(message, sends, recvs)
        else:
            self._start_tagged(message, sends, recvs, tag)
        return message

    def _start_tagged(self, message: Message, sends: Sequence[Parcel], recvs: Sequence[Parcel], tag: int) -> None:
        for post, end, parcels, verb in (
            (dist.irecv, "group_src", recvs, "receiving from"),
            (dist.isend, "group_dst", sends, "sending to"),
        ):
            sent_before: Counter[int] = Counter()
            for peer, tensor in parcels:
                try:
                    with unrecorded():
                        work = post(tensor, group=self.group, tag=tag + sent_before[peer], **{end: peer})
                except RuntimeError as error:
                    # The peer may have finished and exited; only a step that needs this message may complain.
                    message.fail(error, f"{verb} rank {peer}")
                    return
                assert work is not None
                sent_before[peer] += 1
                message.pending.append((work, f"{verb} rank {peer}"))

    def _start_grouped(self, message: Message, sends: Sequence[Parcel], recvs: Sequence[Parcel]) -> None:
        # torch asks for the tensors' device to be the current one around a batch.
        elsewhere = self.device.type == "cuda" and self.device.index != torch.cuda.current_device()
        here: AbstractContextManager[object] = torch.cuda.device(self.device) if elsewhere else nullcontext()
        with here:
            for some_sends, some_recvs in self._batches(sends, recvs):
                ops = [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for peer, tensor in some_recvs]
                ops += [
                    dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for peer, tensor in some_sends
                ]
                peers = _Peers(some_recvs, some_sends)
                try:
                    message.pending += [(work, peers) for work in dist.batch_isend_irecv(ops)]
                except RuntimeError as error:
                    message.fail(error, peers)
                    break
        assert self._watchdog is not None
        self._watchdog.watch(message.label, message.pending)

    def _batches(
        self, sends: Sequence[Parcel], recvs: Sequence[Parcel]
    ) -> Iterator[tuple[Sequence[Parcel], Sequence[Parcel]]]:
        """The operations of a message in batches that NCCL can take, none of them empty.

        A message of too many operations is cut by distance, (receiver - sender) mod n, at fixed distances. So both ends of an
        edge have it in the batch of the same number, or one of them has all of its operations in one: by induction over
        the numbers every batch finds its other ends posted, and none waits in a circle.
        """
        if len(sends) + len(recvs) <= _LARGEST_BATCH:
            if sends or recvs:
                yield sends, recvs
            return
        size, me = self.world.size, self.world.rank
        # As many to one peer on all ranks: codes and scales, or the messages of an algorithm.
        most = max(
            count for parcels in (sends, recvs) for count in Counter(peer for peer, _ in parcels).values() or (1,)
        )
        span = max(1, _LARGEST_BATCH // (2 * most))
        for first in range(0, size, span):
            some_sends = [parcel for parcel in sends if first <= (parcel[0] - me) % size < first + span]
            some_recvs = [parcel for parcel in recvs if first <= (me - parcel[0]) % size < first + span]
            if some_sends or some_recvs:
                yield some_sends, some_recvs

    def keep(self, message: Message) -> None:
        """Keep an abandoned message's works alive until they have completed."""
        if message.pending and message not in self._abandoned:
            self._abandoned.append(message)

    def failure(self, error: Exception, what: str) -> Exception:
        """The exception for an exchange that will never be complete; `what` names it and its peers."""
        where = f"rank {self.world.rank}: {what}"
        notes = self._read_notes()
        found: Exception
        if notes:
            gone = ", ".join(f"rank {rank} after {steps} steps" for rank, steps in notes.items())
            rest = [rank for rank in range(self.world.size) if rank not in notes]
            found = RankLeft(
                f"{where}: left with opt.leave(): {gone}. A group cannot go on without a member: end here too, or build a new "
                f"optimizer with group=fusedfog.new_group({[self.world.ranks[rank] for rank in rest]}) and sync_init=False",
                tuple(notes),
            )
        elif is_timeout(error):
            limit = f"{self.timeout.total_seconds():g} s"
            found = PeerTimeout(
                f"{where}: nothing within the process group's timeout of {limit}. That rank is stuck, far behind or gone; "
                f"raise init_process_group(timeout=...) if it is only slow"
            )
        else:
            found = ExchangeError(f"{where}: connection lost, the rank has probably exited ({error})")
        # Its traceback would keep gloo's works alive, and with them the connections that `close` closes.
        found.__cause__ = error.with_traceback(None)
        return found

    def _read_notes(self) -> dict[int, str]:
        """Ranks that have left and their numbers of steps. Asks the store, so only for what has failed already."""
        # The store may have gone with the rank that hosted it.
        with contextlib.suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            keys = {rank: f"{self._notes}/left/{rank}" for rank in range(self.world.size)}
            return {rank: store.get(key).decode() for rank, key in keys.items() if store.check([key])}
        return {}

    def leave(self, steps: int) -> None:
        """Tell the other ranks that this one exchanges nothing more, deliver what was sent, and end the link.

        Links among some of these ranks, those of a mesh, end with it.
        """
        store = dist.distributed_c10d._get_default_store()
        reason = RuntimeError(f"rank {self.world.rank} has left (opt.leave()); to train on, build a new optimizer")
        for link in _current().links.values():
            if set(link.world.ranks) <= set(self.world.ranks):
                store.set(f"{link._notes}/left/{link.world.rank}", str(steps))
                link._end(reason, _LAST_MOMENT)

    def give_up(self, failure: Exception) -> None:
        """End the link if a rank has left, so that those who wait for this one are told in their turn."""
        if isinstance(failure, RankLeft):
            self._end(failure, 0.0)

    def _end(self, reason: Exception, patience: float) -> None:
        if self.ended is None:
            self.ended = reason
            # Destroying an NCCL group may wait for its peers; there the watchdog reads the notes.
            if not self.on_gpu:
                self.close(patience)

    def close(self, patience: float = _LAST_MOMENT) -> None:
        """Let go of works, tensors and group while Python still runs; for the end of the process, or of this rank's part.

        A gloo thread that drops a tensor while the interpreter shuts down aborts the process, and optimizers at module
        level live until then. What is in flight gets `patience` seconds to complete, for the sake of peers that need it.
        """
        deadline = time.monotonic() + patience
        for message in list(self._started):
            if message.waiter is not None:
                message.waiter.join(max(0.0, deadline - time.monotonic()))
            while message.pending and not self.on_gpu and message.failure is None:
                with contextlib.suppress(RuntimeError):
                    message.pending[0][0].wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
                del message.pending[:1]
            message.pending.clear()
            message.keep_alive.clear()
        self._abandoned.clear()
        if self._group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(self._group)
        self._group = None

    def _retire(self) -> None:
        # A failed message keeps its other works for good: its connections are broken, but dropping them breaks more.
        self._abandoned = [message for message in self._abandoned if message.failure is not None or not message.done()]


@atexit.register
def _close_links() -> None:
    if _Links.default is not None:
        for link in _Links.links.values():
            link.close()
        _Links.links.clear()
        _Links.default = None


class _Links:
    """The links of the current world; a new world (destroy, init again) starts afresh."""

    default: dist.ProcessGroup | None = None
    links: dict[tuple[object, ...], Link]


def _current() -> _Links:
    default = dist.distributed_c10d._get_default_group()
    if _Links.default is not default:
        _Links.default, _Links.links = default, {}
    return _Links()


def link_for(world: World, place: torch.device, comm_sms: int | None = None, number: int = 0) -> Link:
    """The link of this world's ranks for tensors on `place`; made at its first use, by all of them together.

    Args:
        comm_sms: how many SMs its kernels may take; links with different limits are different ones.
        number: another one beside the first, whose operations do not wait for those of the first.
    """
    links = _current().links
    key = (world.ranks, str(place), comm_sms if device.on_gpu(place) else None, number)
    if key not in links or links[key].ended is not None:
        links[key] = Link(world, place, comm_sms)
    return links[key]
