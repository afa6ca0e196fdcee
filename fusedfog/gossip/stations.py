"""The windows of an asynchronous optimizer: one for each segment, and what this rank holds of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusedfog.comm.window.endpoint import LAST_MOMENT, Endpoint
from fusedfog.comm.window.links import InLink
from fusedfog.gossip.buckets import Inbox
from fusedfog.kernels import device
from fusedfog.params.flat import FlatSegment


@dataclass(eq=False)
class Station:
    """One segment's window.

    Attributes:
        endpoint: this rank's end of it.
        buckets: how many buckets the segment has.
        mass: push-sum's, what this rank holds of it; of averages 1. 0 of a newcomer to an elastic run that has mixed nothing yet:
            others mix nothing of it.
        filled: how many buckets have been passed over since the last message.
        inbox: what this step mixes, once it is known.
        rooms: on a GPU, where the fronts are copied to, by in-neighbour.
    """

    segment: FlatSegment
    endpoint: Endpoint
    buckets: int
    mass: float = 1.0
    filled: int = 0
    inbox: Inbox | None = None
    rooms: dict[int, Tensor] = field(default_factory=dict)

    def front(self, link: InLink, mixed: bool) -> Tensor:
        """What has arrived from a neighbour, on the parameters' device; zeros there if it is not to be mixed."""
        if not device.on_gpu(self.segment.param):
            return link.inbox.front
        if link.peer not in self.rooms:
            self.rooms[link.peer] = torch.empty_like(self.segment.param)
        room = self.rooms[link.peer]
        if mixed:
            link.inbox.read(room)
        else:
            room.zero_()  # Whatever is not finite there would spread, times a weight of 0.
        return room


@dataclass
class Stations:
    """All of them; what a finalizer closes."""

    by_segment: dict[int, Station] = field(default_factory=dict)

    def close(self, patience: float = LAST_MOMENT) -> None:
        """Close all windows; what is in flight gets `patience` seconds."""
        for station in self.by_segment.values():
            station.endpoint.close(patience)
        self.by_segment.clear()
