"""Compressed messages of one optimizer: what neighbours know of each bucket, and what was sent to them last.

Between `scheduler`, which makes codes in its passes, and `mailbox`, which sends them; `kernels.wire` explains the scheme.
Each round of the topology's period has replicas of its own, because in each round a rank exchanges with other neighbours: a
time-varying graph is then as exact as a static one, for 8 bytes an element and round.

Replicas must agree between sender and receivers, so they begin, at the first exchange and after every change of topology
or parameters, as rank 0's values, which are broadcast. A message made is never lost: codes that were sent, or would have
been, are part of `replica` already, so after a pause or on resume the very same codes are sent (again).

Where members come and go, nobody broadcasts (`exactly`): of each round's first exchange, the replicas themselves travel, which
are then the values as they are. So it mixes as exact messages do, and neighbours begin to know each other by it. A member that
dies meanwhile is missed as in any exchange, and the epoch that follows forgets everything.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedfog.comm.agreement import confer, next_agreement
from fusedfog.comm.averaging import broadcast
from fusedfog.comm.communicator import Communicator
from fusedfog.errors import NonFiniteError
from fusedfog.gossip.buckets import BucketState, Inbox
from fusedfog.gossip.late_read import LateRead
from fusedfog.kernels import CompressedChannel, device, wire
from fusedfog.params.flat import FlatSegment
from fusedfog.topology import Topology
from fusedfog.topology.admission import Admission


def is_wire_state(name: str) -> bool:
    """Whether a state of this name is one of `CompressedChannels.names`."""
    return re.fullmatch(r".*_(replica\d+|neighbor_delta\d+|encoded)", name) is not None


def own_states(segment: FlatSegment, channels: CompressedChannels | None) -> tuple[str, ...]:
    """States that are neither the algorithm's nor the inner optimizer's, and that parameters without gradients have too."""
    remainder = () if segment.remainder_name is None else (segment.remainder_name,)
    return (*remainder, *channels.names()) if channels is not None and segment.layout.mix else remainder


@dataclass(frozen=True)
class ReplicasToCome:
    """Of a bucket's first exchange in a round: its inbox, and for each message the tensors in which replicas arrive."""

    inbox: Inbox
    replicas: list[list[Tensor]]


class CompressedChannels:
    """All compressed channels of one optimizer: one for each segment, message and round of the topology.

    Args:
        segments: the optimizer's, a list that may grow.
        dtype: of the codes.
        messages: names of the flat tensors that travel.
        ahead: messages are made a step ahead, and so are in flight at the end of a step.

    Attributes:
        era: how often replicas were forgotten, and with them the tensors of all channels.
        exactly: replicas begin with a round's first exchange, not with a broadcast, and no checkpoint has them.
    """

    def __init__(
        self,
        segments: list[FlatSegment],
        dtype: torch.dtype,
        messages: tuple[str, ...],
        communicator: Communicator,
        *,
        ahead: bool,
    ) -> None:
        self.segments, self.dtype, self.messages, self.communicator, self.ahead = (
            segments,
            dtype,
            messages,
            communicator,
            ahead,
        )
        self.period = 1
        self.era = 0
        self.exactly = False
        self._admission: Admission | None = None
        self._begun: set[tuple[int, int]] = set()
        self._to_come: dict[int, ReplicasToCome] = {}
        self._replicas_agree = False
        self._wires: dict[tuple[FlatSegment, str, int], CompressedChannel] = {}
        self._encoded: dict[int, int] = {}
        self._reports = LateRead()

    def use_topology(self, topology: Topology | None) -> None:
        """Forget all replicas, and keep one for each round of this topology from now on.

        An admission's one exchange is a round of its own: differences by its weights do not sum to zero over the ranks, and
        are forgotten after it, while those of the rounds that go on are kept.
        """
        before, self._admission = self._admission, topology if isinstance(topology, Admission) else None
        if before is not None and topology is before.inner:
            self._drop_wires(self.period)
            return
        rounds = self._admission.inner if self._admission is not None else topology
        self.period = rounds.finite_period("wire_dtype") if rounds is not None else 1
        self.forget()

    def forget(self) -> None:
        """Start anew from rank 0's values at the next exchange."""
        self._replicas_agree = False
        self.era += 1
        self._encoded.clear()
        self._begun.clear()
        self._to_come.clear()
        self._drop_wires()

    def _drop_wires(self, only: int | None = None) -> None:
        """Drop the channels of a round, or of all."""
        for segment, name, number in [key for key in self._wires if only in (None, key[2])]:
            for kind in ("replica", "neighbor_delta"):
                segment.states.pop(f"{name}_{kind}{number}", None)
            del self._wires[segment, name, number]

    def names(self) -> tuple[str, ...]:
        """The states that a checkpoint has to hold."""
        if self.exactly:
            return ()
        kinds = [f"{kind}{number}" for number in range(self.period) for kind in ("replica", "neighbor_delta")]
        return tuple(f"{name}_{kind}" for name in self.messages for kind in [*kinds, *["encoded"] * self.ahead])

    def start_replicas(self) -> None:
        """Agree with the other ranks on replicas. Collective, but for those that begin `exactly`, which are not begun here."""
        if self.exactly:
            return
        for segment in self.segments:
            for name in self.messages if segment.layout.mix else ():
                first, *others = (self._wire(segment, name, number) for number in range(self.period))
                # Nobody could be told a difference from what is not finite.
                first.replica.copy_(segment.tensor(name)).nan_to_num_(0.0, 0.0, 0.0)
                broadcast([first.replica], self.communicator)
                for other in others:
                    other.replica.copy_(first.replica)
                for end in (first, *others):
                    end.neighbor_delta.zero_()
        self._replicas_agree = True

    def of(self, segment: FlatSegment, exchange: int) -> tuple[CompressedChannel, ...]:
        """A segment's channels in exchange number `exchange`, one per message. The first call is collective."""
        if not self._replicas_agree:
            self.start_replicas()
        return tuple(self._wire(segment, name, self._number(exchange)) for name in self.messages)

    def _number(self, exchange: int) -> int:
        """Which replicas an exchange has."""
        admits = self._admission is not None and exchange == self._admission.at
        return self.period if admits else exchange % self.period

    # -- the first exchange of a round -------------------------------------------------------------------------------

    def begins(self, bucket: BucketState, exchange: int) -> bool:
        """Whether neighbours learn a bucket's replicas by this exchange, in which they travel themselves."""
        return self.exactly and (bucket.number, self._number(exchange)) not in self._begun

    def await_replicas(self, bucket: BucketState, exchange: int, inbox: Inbox, count: int) -> list[list[Tensor]]:
        """For each message, the tensors in which `count` neighbours' replicas will arrive; `inbox` is what a pass will have."""
        size = bucket.layout.stop - bucket.layout.start
        replicas = [[end.replica.new_empty(size) for _ in range(count)] for end in self.of(bucket.segment, exchange)]
        self._to_come[bucket.number] = ReplicasToCome(inbox, replicas)
        return replicas

    def arrive(self, bucket: BucketState, exchange: int) -> None:
        """A bucket's messages of an exchange have come. Of replicas a pass sees the differences, and codes that say nothing."""
        came = self._to_come.pop(bucket.number, None)
        if came is None or came.inbox is not bucket.inbox:
            return
        here = bucket.whole
        for m, end in enumerate(came.inbox.channels):
            part = wire.cut(end, here.start, here.stop)
            part.neighbor_delta.zero_()
            for replica, weight in zip(came.replicas[m], came.inbox.weights, strict=True):
                part.neighbor_delta.add_(replica.sub_(part.replica).mul_(weight))
            for codes in came.inbox.tensors[m]:
                codes[here].zero_()
        self._begun.add((bucket.number, self._number(exchange)))

    # -- codes -------------------------------------------------------------------------------------------------------

    def encode(self, bucket: BucketState, exchange: int) -> None:
        """Have codes for a bucket's part in an exchange, if no pass has made them.

        Raises:
            NonFiniteError: as `check`.
        """
        if self._encoded.get(bucket.number) == exchange:
            return
        here, begins = bucket.whole, self.begins(bucket, exchange)
        for name, end in zip(self.messages, self.of(bucket.segment, exchange), strict=True):
            part = wire.cut(end, here.start, here.stop)
            value = bucket.segment.value(name)[here].to(part.replica.dtype)
            if begins:
                self.flag[0].add_(value.isfinite().logical_not().any())
                part.codes.zero_()
                part.replica.copy_(value).nan_to_num_(0.0, 0.0, 0.0)
            else:
                wire.give(part, value, self.flag)
        self.encoded([bucket], exchange)

    def encoded(self, buckets: Sequence[BucketState], exchange: int) -> None:
        """The codes of these buckets for this exchange have been made.

        Raises:
            NonFiniteError: on CPUs, if they leave out values that are not finite; nobody was sent them. On GPUs `report`
                raises it.
        """
        for bucket in buckets:
            self._encoded[bucket.number] = exchange
        if not device.on_gpu(self.flag) and bool(self.flag.any()):
            self._refuse()

    @functools.cached_property
    def flag(self) -> Tensor:
        """fp32 [4], where passes note that codes leave out values that are not finite."""
        return self.segments[0].param.new_zeros(4, dtype=torch.float32)

    def report(self) -> None:
        """On GPUs, at the end of a step: ask whether any codes left out values, without waiting for the answer.

        One copy and one event a step.

        Raises:
            NonFiniteError: those of an earlier step did.
        """
        if not device.on_gpu(self.flag):
            return
        for seen, _ in self._reports.answers():
            if seen.any():
                self._refuse()
        self._reports.ask(self.flag)

    def _refuse(self) -> None:
        self.flag.zero_()
        self._reports.forget()
        slots = [(segment, slot) for segment in self.segments if segment.layout.mix for slot in segment.layout.slots]
        bad = [(slot.spec.name, int((~one.param[slot.start : slot.stop].isfinite()).sum())) for one, slot in slots]
        names = ", ".join(f"{name} ({count})" for name, count in bad if count) or "a message"
        raise NonFiniteError(
            f"rank {self.communicator.view.rank}: values that are not finite in {names}; "
            f"{self.dtype} messages cannot carry them, and "
            f"neighbours were not sent them. Lower the learning rate, clip gradients or use a GradScaler, and go back to a "
            f"checkpoint"
        )

    def pending(self, exchange: int) -> bool:
        """Whether exchange number `exchange`, the next one, has codes already; they are then decoded to the "encoded" states."""
        found = self.ahead and not self.exactly and exchange in self._encoded.values()
        for segment, name, end in self._ends(exchange) if found else ():
            segment.state(f"{name}_encoded").copy_(wire.decode(end.codes, end.scales, end.neighbor_delta.dtype))
        return found

    def _ends(self, exchange: int) -> list[tuple[FlatSegment, str, CompressedChannel]]:
        return [
            (segment, name, end)
            for segment in self.segments
            if segment.layout.mix
            for name, end in zip(self.messages, self.of(segment, exchange), strict=True)
        ]

    def all_ranks(self, agree: bool) -> bool:
        """Whether `agree` is true on all ranks: if only some kept their replicas, neighbours' copies would differ. Collective."""
        communicator = self.communicator
        prefix = next_agreement(communicator.view)
        return bool(confer(communicator.view, prefix, agree, all, communicator.timeout, "load_state_dict()"))

    def resume(self, buckets: Sequence[BucketState], exchange: int, pending: bool) -> None:
        """Go on with the replicas that were loaded into the states; `pending` codes are sent by the next exchange."""
        self._replicas_agree = True
        self._encoded = {bucket.number: exchange for bucket in buckets if pending}
        for segment, name, end in self._ends(exchange) if pending else ():
            # Exact: what was decoded has the same codes.
            codes, scales = wire.encode(segment.state(f"{name}_encoded"), self.dtype)
            end.codes.copy_(codes)
            if end.scales is not None and scales is not None:
                end.scales.copy_(scales)

    def _wire(self, segment: FlatSegment, name: str, number: int) -> CompressedChannel:
        key = (segment, name, number)
        if key not in self._wires:
            scales = segment.param.new_zeros(segment.layout.numel // wire.ELEMENTS_PER_SCALE, dtype=torch.uint8)
            self._wires[key] = CompressedChannel(
                torch.zeros_like(segment.param, dtype=self.dtype),
                None if wire.FORMATS[self.dtype] is None else scales,
                segment.state(f"{name}_replica{number}"),
                segment.state(f"{name}_neighbor_delta{number}"),
            )
        return self._wires[key]
