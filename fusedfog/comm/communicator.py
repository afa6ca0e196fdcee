"""Point-to-point exchange of buckets over torch.distributed, NCCL and gloo behind one interface.

A `Communicator` is a dedicated process group of a set of ranks, which optimizers share, each with a channel number of its own;
plain-tensor operations have another one on CPUs, and share the optimizers' on GPUs. `Communicator.start` posts all receives and
sends of one bucket and returns a `Transfer`; `Transfer.wait` makes the data usable: on gloo it blocks the host, on NCCL only
the current stream.

Rules that keep this free of deadlock:
 - Every rank starts the same buckets in the same order, from one thread. NCCL matches by order (one group call a bucket,
   no tags); gloo matches by tag.
 - Receives are posted before sends: a gloo send completes only when its receive is posted.
 - A gloo work is waited for exactly once (a second wait never returns) and is never dropped while pending (that breaks its
   connection for everyone): what its owner abandons, the communicator keeps until it has completed. A wait for a NCCL work only
   orders the stream that is current, so every stream that uses a result waits for it again.
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from fusedfog.comm import calls
from fusedfog.comm.agreement import confer, next_agreement
from fusedfog.comm.group import GroupView, check_backend, group_timeout
from fusedfog.comm.membership import Membership
from fusedfog.comm.shared_buffers import SharedBuffers
from fusedfog.comm.shared_opening import open_shared
from fusedfog.comm.subgroup import check_one_rank_per_gpu, dedicated_group, nccl_options
from fusedfog.comm.transfer import PeerTensor, Transfer, unrecorded
from fusedfog.comm.watchdog import Watchdog
from fusedfog.errors import DivergedError, ExchangeError, NonFiniteError, PeerTimeout, RankLeft
from fusedfog.kernels import device

LAST_MOMENT = 5.0
"""Seconds that messages in flight get when the process ends, or its part in training."""

_LARGEST_BATCH = 256
"""Operations in one NCCL group call; with more it can hang (pytorch#174288)."""


@dataclass(frozen=True)
class _Peers:
    """Whom a batch is with, in words that are only put together for an error."""

    recvs: Sequence[PeerTensor]
    sends: Sequence[PeerTensor]

    def __str__(self) -> str:
        sources, targets = ([peer for peer, _ in part] for part in (self.recvs, self.sends))
        return f"receiving from ranks {sources}, sending to ranks {targets}"


class Communicator:
    """The dedicated process group of one set of ranks.

    Attributes:
        view: this rank's place among them.
        device: where its tensors are.
        on_gpu: whether works are queued on streams, as NCCL's.
        timeout: how long a wait may last.
        ended: why nothing can be exchanged any more, once that is so.
        name: a store key prefix of its own, the same on all of its ranks.
        membership: who of these ranks is still there.
    """

    def __init__(self, view: GroupView, place: torch.device, comm_sms: int | None = None) -> None:
        assert view.group is not None
        self.view, self.device = view, place
        self.on_gpu = device.on_gpu(place)
        check_backend(view, place)
        self.timeout = group_timeout(view, place)
        calls.enter_world(self.timeout.total_seconds())
        if self.on_gpu:
            check_one_rank_per_gpu(view, place, self.timeout)
        options = nccl_options(view, place, self.timeout, comm_sms) if self.on_gpu else None
        self._group: dist.ProcessGroup | None = dedicated_group(view.ranks, self.timeout, options)
        self.ended: Exception | None = None
        self.name = next_agreement(view)
        self.membership = Membership(view, self.name, self.timeout)
        self._channels = 0
        self._abandoned: list[Transfer] = []
        self._started: weakref.WeakSet[Transfer] = weakref.WeakSet()
        self._warm: tuple[set[int], set[int]] = (set(), set())
        self._shared: SharedBuffers | None = None
        self._shared_asked = False
        self._watchdog = Watchdog(self) if self.on_gpu else None
        # The first operation of an NCCL group must involve all of its ranks; on gloo this meets every peer once.
        with self.waiting("opening the communicator, with all ranks"):
            dist.all_reduce(torch.zeros(1, device=place), group=self.group)
        calls.remember_addresses(view)

    @property
    def group(self) -> dist.ProcessGroup:
        """The dedicated group, created with the parent's timeout; raises `ended`, once that is there."""
        if self._group is None or self.ended is not None:
            raise self.ended or RuntimeError("the process is ending")
        return self._group

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Inside, torch's errors of the network become `failure`'s; `what` says what is done, and with whom."""
        try:
            yield
        except (PeerTimeout, ExchangeError):
            raise
        except RuntimeError as error:
            if not calls.is_network_error(error):
                raise
            found = self.failure(error, what)
            self.give_up(found)
            raise found from found.__cause__

    def meet(self, call: str) -> None:
        """Return once every rank has come to this call; nothing has been posted to the group until then.

        Raises:
            MismatchError: another rank is in another call; names both.
            PeerTimeout: a rank did not come; names it.
        """
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
        return transfer

    def _start_tagged(
        self, transfer: Transfer, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor], tag: int
    ) -> None:
        for post, end, part, verb in (
            (dist.irecv, "group_src", recvs, "receiving from"),
            (dist.isend, "group_dst", sends, "sending to"),
        ):
            sent_before: Counter[int] = Counter()
            for peer, tensor in part:
                try:
                    with unrecorded():
                        work = post(tensor, group=self.group, tag=tag + sent_before[peer], **{end: peer})
                except RuntimeError as error:
                    # The peer may have finished and exited; only a step that needs this message may complain.
                    transfer.fail(error, f"{verb} rank {peer}")
                    return
                assert work is not None
                sent_before[peer] += 1
                transfer.pending.append((work, f"{verb} rank {peer}"))

    def _start_grouped(self, transfer: Transfer, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]) -> None:
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
                    transfer.pending += [(work, peers) for work in dist.batch_isend_irecv(ops)]
                except RuntimeError as error:
                    transfer.fail(error, peers)
                    break
        assert self._watchdog is not None
        self._watchdog.watch(transfer.label, transfer.pending)

    def _batches(
        self, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]
    ) -> Iterator[tuple[Sequence[PeerTensor], Sequence[PeerTensor]]]:
        """The operations of a message in batches that NCCL can take, none of them empty.

        A message of too many operations is cut by distance, (receiver - sender) mod n, at fixed distances. So both ends of an
        edge have it in the batch of the same number, or one of them has all of its operations in one: by induction over
        the numbers every batch finds its other ends posted, and none waits in a circle.
        """
        if len(sends) + len(recvs) <= _LARGEST_BATCH:
            if sends or recvs:
                yield sends, recvs
            return
        size, me = self.view.size, self.view.rank
        # As many to one peer on all ranks: codes and scales, or the messages of an algorithm.
        most = max(count for part in (sends, recvs) for count in Counter(peer for peer, _ in part).values() or (1,))
        span = max(1, _LARGEST_BATCH // (2 * most))
        for first in range(0, size, span):
            some_sends = [one for one in sends if first <= (one[0] - me) % size < first + span]
            some_recvs = [one for one in recvs if first <= (me - one[0]) % size < first + span]
            if some_sends or some_recvs:
                yield some_sends, some_recvs

    def register(self, transfer: Transfer) -> None:
        """Know of a transfer, for when the communicator is closed."""
        self._started.add(transfer)

    def keep(self, transfer: Transfer) -> None:
        """Keep an abandoned message's works alive until they have completed."""
        if transfer.pending and transfer not in self._abandoned:
            self._abandoned.append(transfer)

    def failure(self, error: Exception, what: str) -> Exception:
        """See `Membership.failure`."""
        return self.membership.failure(error, what)

    def give_up(self, failure: Exception) -> None:
        """End the communicator if a rank has left, or cannot go on: those who wait for this one are then told in their turn."""
        if isinstance(failure, (RankLeft, NonFiniteError, DivergedError)):
            self.end(failure, 0.0)

    def end(self, reason: Exception, patience: float) -> None:
        """Exchange nothing more, for this reason; what is in flight gets `patience` seconds."""
        if self.ended is None:
            self.ended = reason
            # Destroying an NCCL group may wait for its peers; there the watchdog reads the notes.
            if not self.on_gpu:
                self.close(patience)

    def close(self, patience: float = LAST_MOMENT) -> None:
        """Let go of works, tensors and group while Python still runs; for the end of the process, or of this rank's part.

        A gloo thread that drops a tensor while the interpreter shuts down aborts the process, and optimizers at module
        level live until then. What is in flight gets `patience` seconds to complete, for the sake of peers that need it.
        """
        deadline = time.monotonic() + patience
        for transfer in list(self._started):
            if transfer.waiter is not None:
                transfer.waiter.join(max(0.0, deadline - time.monotonic()))
            while transfer.pending and not self.on_gpu and transfer.failure is None:
                with contextlib.suppress(RuntimeError):
                    transfer.pending[0][0].wait(timedelta(seconds=max(0.001, deadline - time.monotonic())))
                del transfer.pending[:1]
            transfer.pending.clear()
            transfer.keep_alive.clear()
        self._abandoned.clear()
        if self._shared is not None:
            self._shared.close()
        if self._group in dist.distributed_c10d._world.pg_map:
            dist.destroy_process_group(self._group)
        self._group = None

    def _retire(self) -> None:
        # A failed transfer keeps its other works for good: its connections are broken, but dropping them breaks more.
        self._abandoned = [
            transfer for transfer in self._abandoned if transfer.failure is not None or not transfer.done()
        ]
