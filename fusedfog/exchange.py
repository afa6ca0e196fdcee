"""Messages in flight: point-to-point exchange of buckets over torch.distributed, NCCL and gloo behind one interface.

A `Link` is the one dedicated process group of a set of ranks; optimizers and plain-tensor operations share it, each with
a channel number of its own. `Link.start` posts all receives and sends of one bucket and returns a `Message`;
`Message.wait` makes the data usable: on gloo it blocks the host, on NCCL only the current stream.

Rules that keep this free of deadlock:
 - Every rank starts the same buckets in the same order, from one thread. NCCL matches by order (one group call a bucket,
   no tags); gloo matches by tag.
 - Receives are posted before sends: a gloo send completes only when its receive is posted.
 - A work is waited for exactly once (a second wait on a gloo work never returns) and is never dropped while pending (a
   dropped gloo work breaks its connection for everyone): what its owner abandons, the link keeps until it has completed.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._autograd import _enable_record_function

from fusedfog.errors import ExchangeError, PeerTimeout, RankLeft
from fusedfog.world import World

log = logging.getLogger("fusedfog")

_LAST_MOMENT = 5.0
"""Seconds that messages in flight get when the process ends, or its part in training."""

_LATE = 2.0
"""Seconds after which it is asked, on GPUs, whether the sender of a message has left."""

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


class Message:
    """One bucket's sends and receives in flight, or how they failed."""

    def __init__(self, link: Link, label: str) -> None:
        self.link = link
        self.label = label
        self.pending: list[tuple[dist.Work, str]] = []
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
        self.keep_alive.clear()

    def _await_works(self) -> None:
        deadline = time.monotonic() + self.link.timeout.total_seconds()
        while self.pending and self.failure is None:
            work, peers = self.pending[0]
            try:
                if self.link.on_gpu:
                    work.wait()
                else:
                    work.wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
            except RuntimeError as error:
                self.fail(error, peers)
            del self.pending[:1]  # Nothing, if the link was closed while this thread waited.

    def fail(self, error: Exception, peers: str) -> None:
        """Note why this message will never be complete; the wait that needs it raises."""
        self.failure = self.link.failure(error, f"{self.label}: {peers}")


class Link:
    """The dedicated process group of one set of ranks.

    Attributes:
        world: this rank's place among them.
        timeout: how long a wait may last.
        ended: why nothing can be exchanged any more, once that is so.
    """

    def __init__(self, world: World, device: torch.device) -> None:
        assert world.group is not None
        self.world = world
        self.on_gpu = device.type == "cuda"
        self.timeout: timedelta = world.group._get_backend(device).options._timeout
        whole = world.size == dist.get_world_size()
        if not whole:
            _level_group_counts(world, self.timeout)
        self._group: dist.ProcessGroup | None = dist.new_group(
            list(world.ranks), timeout=self.timeout, use_local_synchronization=not whole, group_desc="fusedfog"
        )
        self.ended: Exception | None = None
        self._notes = next_agreement(world)
        self._channels = 0
        self._abandoned: list[Message] = []
        self._started: weakref.WeakSet[Message] = weakref.WeakSet()
        self._watchdog = Watchdog(self) if self.on_gpu else None
        # The first operation of an NCCL group must involve all of its ranks; on gloo this meets every peer once.
        dist.all_reduce(torch.zeros(1, device=device), group=self.group)

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

    def warm_up(self, rounds: Sequence[tuple[list[int], list[int]]], device: torch.device) -> None:
        """Open NCCL's connections for rounds of (ranks to send to, ranks to receive from); gloo needs none of this."""
        if not self.on_gpu:
            return
        token = torch.zeros(1, device=device)
        for sends, recvs in rounds:
            sink = [(peer, torch.empty_like(token)) for peer in recvs]
            self.start([(peer, token) for peer in sends], sink, tag=0, label="warm-up").wait()

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
        ops = [dist.P2POp(dist.irecv, tensor, group=self.group, group_peer=peer) for peer, tensor in recvs]
        ops += [dist.P2POp(dist.isend, tensor, group=self.group, group_peer=peer) for peer, tensor in sends]
        if not ops:
            return
        peers = f"receiving from ranks {[p for p, _ in recvs]}, sending to ranks {[p for p, _ in sends]}"
        try:
            message.pending = [(work, peers) for work in dist.batch_isend_irecv(ops)]
        except RuntimeError as error:
            message.fail(error, peers)
        assert self._watchdog is not None
        self._watchdog.watch(message)

    def keep(self, message: Message) -> None:
        """Keep an abandoned message's works alive until they have completed."""
        if message.pending:
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
                f"optimizer with group= the ranks {rest} and sync_init=False",
                tuple(notes),
            )
        elif "imed out" in str(error):
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


class Watchdog:
    """Logs NCCL messages that are overdue, naming peers, step and bucket, before torch's own watchdog aborts.

    `Work.wait` on NCCL only blocks a stream, so nothing else could tell which message hangs. The thread polls completion
    events and touches no communicator; it ends with its link.
    """

    def __init__(self, link: Link) -> None:
        self._watched: list[tuple[float, str, list[dist.Work]]] = []
        self._lock = threading.Lock()
        # Half the group's timeout: torch aborts the process at the whole of it.
        self._patience = link.timeout.total_seconds() / 2
        self._rank = link.world.rank
        threading.Thread(target=self._run, args=(weakref.ref(link),), daemon=True, name="fusedfog-watchdog").start()

    def watch(self, message: Message) -> None:
        """Follow a message until it completes."""
        works = [work for work, _ in message.pending]
        if works:
            with self._lock:
                what = f"{message.label}: {message.pending[0][1]}"
                self._watched.append((time.monotonic() + self._patience, what, works))

    def _run(self, link: weakref.ref[Link]) -> None:
        while (living := link()) is not None:
            self._look_for_notes(living)
            del living
            time.sleep(min(1.0, self._patience / 4))
            now = time.monotonic()
            with self._lock:
                pending = [entry for entry in self._watched if not all(work.is_completed() for work in entry[2])]
                overdue = [entry for entry in pending if entry[0] < now]
                self._watched = [entry for entry in pending if entry[0] >= now]
            for _, what, _ in overdue:
                log.error("rank %d: %s: still waiting after %.0f s", self._rank, what, self._patience)

    def _look_for_notes(self, link: Link) -> None:
        """End the link if somebody has left; the store is asked only while a message takes seconds."""
        with self._lock:
            late = [what for at, what, _ in self._watched if at - self._patience + _LATE < time.monotonic()]
        if late and link.ended is None and link._read_notes():
            link.give_up(link.failure(RuntimeError("the message has not come"), late[0]))
            log.error("%s", link.ended)


@atexit.register
def _close_links() -> None:
    if _Links.default is not None:
        for link in _Links.links.values():
            link.close()
        _Links.links.clear()
        _Links.default = None


class _Links:
    """The links and agreement counters of the current world; a new world (destroy, init again) starts afresh."""

    default: dist.ProcessGroup | None = None
    links: dict[tuple[tuple[int, ...], str], Link]
    agreements: dict[tuple[int, ...], int]


def _current() -> _Links:
    default = dist.distributed_c10d._get_default_group()
    if _Links.default is not default:
        _Links.default, _Links.links, _Links.agreements = default, {}, {}
    return _Links()


def link_for(world: World, device: torch.device) -> Link:
    """The link of this world's ranks for tensors on `device`; made at its first use, by all of them together."""
    links = _current().links
    key = (world.ranks, device.type)
    if key not in links or links[key].ended is not None:
        links[key] = Link(world, device)
    return links[key]


def _level_group_counts(world: World, timeout: timedelta) -> None:
    """Give every member of a subgroup the same number of process groups before they create one among themselves.

    torch names a locally synchronized group after its ranks and the number of groups the process already has, so members
    with different numbers would wait for each other under different names until the timeout.
    """
    store, prefix = dist.distributed_c10d._get_default_store(), next_agreement(world)
    own = len(dist.distributed_c10d._world.pg_names)
    store.set(f"{prefix}/{world.rank}", str(own))
    keys = [f"{prefix}/{rank}" for rank in range(world.size)]
    store.wait(keys, timeout)
    for _ in range(max(int(store.get(key)) for key in keys) - own):
        dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)


def next_agreement(world: World) -> str:
    """A store key prefix for the next thing these ranks agree on, the same on each of them."""
    counters = _current().agreements
    number = counters.get(world.ranks, 0)
    counters[world.ranks] = number + 1
    members = "-".join(map(str, world.ranks)) if world.size <= 16 else f"{hash(world.ranks):x}"
    return f"fusedfog/{members}/{number}"
