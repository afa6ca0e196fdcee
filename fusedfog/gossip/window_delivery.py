"""Delivery by windows, for asynchronous optimizers: what a rank mixes is the newest of each neighbour, and nobody waits.

Every segment has a window. Once a step has passed over all of its buckets, the segment is written into the neighbours' memory,
and the next step's inbox are the fronts of this rank's own: no copy, no wait. (On a GPU: copies of them; see
comm/window/staging.py.)

Averages (awc) give weight W_ij to the newest value of neighbour j, *reused until a newer one comes*. So the limit solves
(I - W + a H) x = a c, as in the synchronous method, whatever the speeds and delays; mixing each value once, or dropping old
ones, would move it towards the minimisers of the fast ranks. A neighbour that has written nothing yet, or is gone, counts as the
rank's own value.

Push-sum deposits (z, mass), the estimate and a share of what the rank holds, and not their product: two deposits that nobody
has taken become one by their mean weighed by mass. With k over the deposits taken,

    z+ = z + sum_k (m_k / w+) (z_k - z) - (a / v) u ;  w+ = w + sum_k m_k

v is the Perron vector of the shares, with mean 1. In the long run rank i holds mass v_i / (its speed) and makes speed_i steps
a second, so that all ranks' gradients count alike.

What a newcomer to an elastic run has is a copy of another rank's values, which would count twice: it has no mass until it has
mixed something, and what it mixes first takes the place of its own. Averages say so to others by a mass of 0.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Collection, Sequence

import numpy as np
from torch import Tensor

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.lookout import Lookout
from fusedfog.comm.transfer import Transfer
from fusedfog.comm.whereabouts import name_ranks
from fusedfog.comm.window.edge import SLOTS, Kind, Message
from fusedfog.comm.window.endpoint import LAST_MOMENT
from fusedfog.comm.window.links import InLink
from fusedfog.comm.window.opening import Plan, check_descriptors, open_endpoint
from fusedfog.comm.window.region import Layout
from fusedfog.comm.window.staging import staging_of
from fusedfog.errors import PeerTimeout
from fusedfog.gossip.buckets import BucketState, Inbox
from fusedfog.gossip.delivery import ExchangeStats, InboxTensors
from fusedfog.gossip.mailbox import Mailbox
from fusedfog.gossip.stations import Station, Stations
from fusedfog.params.flat import FlatSegment
from fusedfog.topology import Topology

_ERA = 1 << 44
"""Stamps count eras, from one collective call that discards messages to the next, and within them exchanges."""

DONE = 1 << 40
"""The number of exchanges that a rank without data gives as its own: nobody waits for it."""

_GLANCE = 0.002


class Sent(Transfer):
    """What stands for a bucket's message: it waits for nothing, unless this rank is too far ahead."""

    def __init__(self, communicator: Communicator, label: str, windows: WindowDelivery) -> None:
        super().__init__(communicator, label)
        self._windows = windows

    def done(self) -> bool:
        """See `Transfer`."""
        return not self._windows.too_far_ahead()

    def wait(self) -> None:
        """See `Transfer`."""
        self._windows.wait_for_slow(self.label)


class WindowDelivery:
    """See `Delivery`.

    Args:
        deposits: push-sum, and not averages.
        max_lag: how many exchanges this rank may be ahead of its slowest in-neighbour; None for any number.

    Attributes:
        done: this rank has no data, and waits for the others.
    """

    def __init__(
        self, communicator: Communicator, stats: ExchangeStats, *, deposits: bool, max_lag: float | None
    ) -> None:
        self.communicator, self.stats = communicator, stats
        self.deposits, self._max_lag = deposits, max_lag
        self.topology: Topology | None = None
        self._layout: list[tuple[FlatSegment, int]] = []
        self._stations = Stations()
        self._era = self._exchange = 0
        self._closed = self.done = False
        self._finalizer = weakref.finalize(self, self._stations.close)

    # -- construction ------------------------------------------------------------------------------------------------

    def use_topology(self, topology: Topology | None) -> None:
        """See `Delivery`; collective, once buckets are laid out."""
        masses = self.masses()
        self.topology = topology
        self._stations.close()
        self._open()
        if masses:
            self.set_masses(masses)

    def lay_out(self, buckets: Sequence[BucketState]) -> None:
        """See `Delivery`; collective, once there is a topology."""
        mixed = [bucket.segment for bucket in buckets if bucket.segment.layout.mix]
        counts = {id(segment): mixed.count(segment) for segment in mixed}
        self._layout = [(segment, counts[id(segment)]) for segment in dict.fromkeys(mixed)]
        for key in [key for key in self._stations.by_segment if key not in counts]:
            self._stations.by_segment.pop(key).endpoint.close()
        self._open()

    def _open(self) -> None:
        """Open the windows that are missing, on all ranks in one order."""
        if self.topology is None or self._closed:
            return
        view = self.communicator.view
        round_ = self.topology.round(view.rank)
        for segment, buckets in self._layout:
            if id(segment) not in self._stations.by_segment:
                number = len(self._stations.by_segment)
                plan = Plan(
                    name=f"the window of segment {number}",
                    fields={"topology": self.topology.fingerprint()[:8], "elements": str(segment.param.numel())},
                    problem=_too_many(len(round_.send) + len(round_.recv)),
                    sends=tuple(sorted(round_.send)),
                    recvs=tuple(sorted(round_.recv)),
                    layout=Layout(segment.param.dtype, segment.param.numel(), SLOTS),
                    initial=None,
                    mass=0.0,
                    source=_nothing_to_get(segment),
                    staging=staging_of(segment.param),
                )
                self._stations.by_segment[id(segment)] = Station(segment, open_endpoint(view, plan), buckets)

    def open_connections(self) -> None:
        """They are open."""

    def inbox_counts(self) -> set[int]:
        """See `Delivery`."""
        return {self.most_inboxes()}

    def most_inboxes(self) -> int:
        """See `Delivery`."""
        return len(self.topology.round(self.communicator.view.rank).recv) if self.topology is not None else 0

    @property
    def open(self) -> bool:
        """Whether there are windows."""
        return bool(self._stations.by_segment)

    def close(self, patience: float = LAST_MOMENT) -> None:
        """This rank mixes nothing more, and the others without it; local. What is in flight gets `patience` seconds."""
        self._closed = True
        self._stations.close(patience)

    def admit(self, fresh: Collection[int]) -> None:
        """Have these ranks begin with what first comes from others, and the others mix nothing of theirs until then.

        What the others hold of push-sum's mass counts so much more that the ranks' masses sum to their number. A rank that
        none of the others reaches, however long it takes, begins with what it has.
        """
        assert self.topology is not None
        fresh = set(fresh) & _reached_by(self.topology, set(range(self.topology.size)) - set(fresh))
        own, size = self.communicator.view.rank, self.topology.size
        mass = size / (size - len(fresh)) if self.deposits else 1.0
        for station in self._in_order():
            station.mass = 0.0 if own in fresh else mass

    # -- steps -------------------------------------------------------------------------------------------------------

    def fill(self, bucket: BucketState, exchange: int, label: str) -> Transfer:
        """See `Delivery`; a segment is sent with the last of its buckets."""
        station = self._stations.by_segment[id(bucket.segment)]
        station.filled += 1
        if station.filled == station.buckets:
            station.filled, station.inbox, self._exchange = 0, None, exchange
            self._send(station)
        return Sent(self.communicator, label, self)

    def _send(self, station: Station) -> None:
        endpoint, values = station.endpoint, station.segment.param
        stamp = self._era * _ERA + (DONE if self.done else self._exchange)
        here = [peer for peer, link in endpoint.out.items() if not link.gone]
        share = station.mass / (len(here) + 1)
        kind, mass = (Kind.MEAN, share) if self.deposits else (Kind.PUT, station.mass)
        with endpoint.lock:
            held = endpoint.hold(values)
            for peer in here:
                endpoint.send(peer, Message(kind, held, 1.0, mass, stamp=stamp))
        if self.deposits:
            station.mass -= share * len(here)
        self.stats.bytes_sent += len(here) * values.nbytes

    def inbox(self, segment: FlatSegment) -> Inbox:
        """What this step mixes of a segment; the same for all of its buckets."""
        station = self._stations.by_segment[id(segment)]
        if station.inbox is None:
            station.inbox = self._take(station)
        return station.inbox

    def _take(self, station: Station) -> Inbox:
        assert self.topology is not None
        weights = self.topology.round(self.communicator.view.rank).recv
        links = dict(sorted(station.endpoint.into.items()))
        with station.endpoint.lock:
            new = [link.inbox.take() for link in links.values()]
            self.stats.bytes_received += sum(new) * station.segment.param.nbytes
            if self.deposits:
                masses = [0.0 if link.inbox.blank else link.inbox.mass for link in links.values()]
                station.mass += sum(masses)
                found = tuple(mass / station.mass if mass else 0.0 for mass in masses)
            else:
                found = tuple(weights[peer] if self._counts(link) else 0.0 for peer, link in links.items())
                if not station.mass and (total := sum(found)):
                    found, station.mass = tuple(weight / total for weight in found), 1.0
            fronts = tuple(
                station.front(link, bool(weight)) for link, weight in zip(links.values(), found, strict=True)
            )
            for link in links.values() if self.deposits else ():
                # The values stay where they are until the next `take`.
                link.inbox.clear()
        return Inbox((fronts,), found, ranks=tuple(links), kept=True)

    def _counts(self, link: InLink) -> bool:
        """Whether averages mix what has come from a neighbour; if not, it counts as this rank's own value."""
        return bool(
            not link.gone and not link.inbox.blank and link.inbox.mass and link.inbox.stamp // _ERA >= self._era
        )

    # -- how far others are ------------------------------------------------------------------------------------------

    def reached(self) -> dict[int, int]:
        """By living in-neighbour, the newest exchange that it has sent something for, as far as has arrived."""
        found: dict[int, int] = {}
        for station in self._stations.by_segment.values():
            with station.endpoint.lock:
                for peer, link in station.endpoint.into.items():
                    if not link.gone:
                        newest = link.inbox.newest_stamp()
                        exchange = newest % _ERA if newest // _ERA >= self._era else 0
                        found[peer] = min(found.get(peer, exchange), exchange)
        return dict(sorted(found.items()))

    def too_far_ahead(self) -> bool:
        """Whether this rank is to wait for its slowest in-neighbour."""
        return self._max_lag is not None and any(
            self._exchange - exchange > self._max_lag for exchange in self.reached().values()
        )

    def wait_for_slow(self, label: str) -> None:
        """Wait until this rank is not too far ahead.

        Raises:
            PeerTimeout: a neighbour stays too far behind; names it.
            PeerTimeout, ExchangeError: no exchange of these ranks will be complete any more; in elastic runs, members change.
        """
        if not self.too_far_ahead():
            return
        communicator, own = self.communicator, self.communicator.view.rank
        limit = communicator.timeout.total_seconds()
        deadline = time.monotonic() + limit
        lookout = Lookout(communicator.view, f"rank {own}: {label}", communicator.name)
        while self.too_far_ahead():
            assert self._max_lag is not None
            behind = [peer for peer, at in self.reached().items() if self._exchange - at > self._max_lag]
            if time.monotonic() > deadline:
                raise PeerTimeout(
                    f"rank {own}: {label}: {name_ranks(behind)} stayed more than max_lag behind for {limit:g} s"
                )
            if communicator.ended is not None:
                raise communicator.ended
            lookout.look(behind)
            time.sleep(_GLANCE)

    def has_news(self) -> bool:
        """Whether something has arrived that no step has used."""
        return any(
            link.inbox.has_news()
            for station in self._stations.by_segment.values()
            for link in station.endpoint.into.values()
        )

    def dead(self) -> list[int]:
        """Neighbours whose processes have ended, or that have closed their windows."""
        gone = {
            link.peer
            for station in self._stations.by_segment.values()
            for link in station.endpoint.links()
            if link.gone
        }
        return sorted(gone)

    def masses(self) -> list[float]:
        """Push-sum's masses of this rank, by segment in the order of buckets."""
        return [station.mass for station in self._in_order()]

    def set_masses(self, masses: Sequence[float]) -> None:
        """Go on with these; with 1 where there are none."""
        for number, station in enumerate(self._in_order()):
            station.mass = masses[number] if number < len(masses) else 1.0

    def _in_order(self) -> list[Station]:
        found = self._stations.by_segment
        return [found[id(segment)] for segment, _ in self._layout if id(segment) in found]

    def settle(self, call: str) -> None:
        """Return once all that any rank has sent lies in its receiver's inbox. Collective."""
        view = self.communicator.view
        lookout = Lookout(view, f"rank {view.rank}: {call}")
        for station in self._stations.by_segment.values():
            station.endpoint.fence(None, look=lookout.look)
            station.filled, station.inbox = 0, None
        self.communicator.meet(call)

    def use_up(self) -> None:
        """What `inbox` has given is mixed; give it to no step."""
        for station in self._stations.by_segment.values():
            station.inbox = None

    def forget(self) -> None:
        """What neighbours have sent until now is not mixed any more. Collective; call `settle` before."""
        self._era += 1


def rate(topology: Topology, rank: int) -> float:
    """1 / v of a rank: what asynchronous push-sum multiplies its learning rate by; 1 on graphs that are regular.

    v is the stationary distribution of the shares 1 / (outdegree + 1), scaled to a mean of 1.
    """
    size = topology.size
    shares = np.zeros((size, size))
    for sender in range(size):
        targets = [*topology.round(sender).send, sender]
        shares[targets, sender] = 1 / len(targets)
    system = np.vstack([shares - np.eye(size), np.ones((1, size))])
    stationary = np.linalg.lstsq(system, np.array([*[0.0] * size, float(size)]), rcond=None)[0]
    return 1 / float(stationary[rank])


def _reached_by(topology: Topology, known: Collection[int]) -> set[int]:
    """The ranks to which values of these come, in however many steps."""
    found, left = set(known), list(known)
    while left:
        further = set(topology.round(left.pop()).send) - found
        found |= further
        left += further
    return found


def _too_many(edges: int) -> Exception | None:
    try:
        check_descriptors(edges)
    except ValueError as error:
        return error
    return None


def _nothing_to_get(segment: FlatSegment) -> Callable[[], tuple[Tensor, float]]:
    return lambda: (segment.param, 0.0)


class WindowMailbox(Mailbox):
    """A mailbox whose messages are copied when they are sent: nothing is in flight, and no edit can tear anything."""

    def __init__(self, communicator: Communicator, windows: WindowDelivery, stats: ExchangeStats) -> None:
        super().__init__(communicator, InboxTensors(("param",)), stats, windows, keeps_edits=False)
        self.windows = windows

    def send(self, bucket: BucketState, exchange: int, label: str, *, to_all: bool = False) -> None:
        """See `Mailbox`."""
        bucket.transfer = self.windows.fill(bucket, exchange, label)

    def receive(self, bucket: BucketState, *, passes_alone_write: bool = False) -> Inbox:
        """See `Mailbox`."""
        self.wait(bucket)
        bucket.transfer = None
        bucket.inbox = self.windows.inbox(bucket.segment)
        return bucket.inbox

    def drain(self, buckets: Sequence[BucketState], *, keep_failures: bool = False) -> None:
        """Nothing is in flight that this rank would have to wait for."""
