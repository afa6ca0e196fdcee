"""Who waits for whom: training steps on all ranks at once, bucket by bucket, in the order of `fusedfog.engine.scheduler`.

Every quantity is a vector over ranks, so 4,096 ranks cost little more than 8. One step of rank i, compute times multiplied by
a factor f_i(t), log-normal with mean 1 and parameter sigma, drawn anew for every rank and step:

    ddp, allreduce   bucket b is reduced from max_i(ready_i) on, one after the other on one communication stream
    awc and kin      the bucket's message of step t is posted by the pass of step t - 1 and waited for by that of step t
    atc and kin      posted by the pass before, in `step` or with `fused_backward` under backward; waited for in `step`
    by machine       as these, after backward has averaged gradients inside machines as allreduce does; passes wait for `step`

A transfer between i and j begins when both have posted it, since neither gloo nor NCCL copies what it sends: so a rank waits
for the neighbours of its round, those that it sends to included, and for nobody else ("local synchrony"). On each rank
exchanges follow each other in the order of buckets, as operations of one NCCL communicator do:

    begin_i = max(posted_i, done_i of the bucket before);  done_i = max over transfers (i, j) of
              max(begin_i, begin_j) + alpha_ij + s / rate_ij
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

import numpy as np

from fusedfog.algorithm import Algorithm
from fusedfog.cost.network import (
    Collective,
    Meeting,
    Network,
    Times,
    allreduce_seconds,
    between_machines,
    finish_by_machine,
    meeting,
)
from fusedfog.cost.workload import Bucket, Workload
from fusedfog.kernels.wire import ELEMENTS_PER_SCALE, FORMATS, wire_format
from fusedfog.topology import Topology

PACKING = 2
"""Tensors of a bucket's size that a copy moves: each gradient goes into the bucket, and the mean back."""

ENCODING = 4
"""Tensors of the model's size in fp32 that a pass with lossy messages reads and writes besides: 16 bytes an element."""

ENCODING_ON_CPU = 22
"""The same where torch's own operations encode, on a CPU without `cpu_compile`. An int8 step of 25 million parameters takes 226
ms more than an exact one (bench/results/wires-cpu.md), in which a copy reads and writes 2.2 GB."""

ENDLESS = 32
"""Rounds of an endless sequence that stand for all."""

SETTLING = 8
LEAST_STEPS = {True: 48, False: 240}
"""Steps measured when all ranks are equally fast, and when they are not."""


Inside: TypeAlias = Literal["gradients", "parameters"]


@dataclass(frozen=True)
class Scheme:
    """What ranks do in a step, as far as its time goes.

    Attributes:
        row: of the algorithm.
        graph: between ranks, or with `inside` between machines; None for algorithms without.
        collective: how an all-reduce is done.
        inside: machines are nodes, and average this inside; None where ranks are nodes.
        wire_bytes: of an fp32 element in a message.
        encoding: `ENCODING`, or `ENCODING_ON_CPU`.
        ddp: it is torch's DistributedDataParallel, with its buckets.
    """

    row: Algorithm
    graph: Topology | None
    collective: Collective = "ring"
    fused_backward: bool = False
    communicate_every: int = 1
    inside: Inside | None = None
    bucket_mb: float = 25
    wire_bytes: float = 4
    encoding: float = ENCODING
    ddp: bool = False

    @property
    def reduces(self) -> bool:
        """Whether gradients travel, to everyone."""
        return self.row.exchanges == "gradients"

    def buckets(self, workload: Workload) -> list[Bucket]:
        """A workload's buckets, in the order in which backward completes them; graded where they travel under computation."""
        if self.ddp:
            return workload.ddp_buckets(self.bucket_mb)
        graded = self.fused_backward or self.reduces or self.row.before is not None
        return workload.buckets(self.bucket_mb, graded=graded)


def wire_bytes(wire: str | None) -> float:
    """Bytes of an fp32 element in messages of this format, its part of a scale included.

    Raises:
        ValueError: there is no such format.
    """
    codes = wire_format(wire)
    if codes is None:
        return 4.0
    return codes.itemsize + (1 / ELEMENTS_PER_SCALE if FORMATS[codes] is not None else 0.0)


@dataclass(frozen=True)
class Prediction:
    """What a method costs per step.

    Attributes:
        step_s: mean seconds of a step, in the long run.
        local_s: the same without communication.
        sent: bytes that a rank sends per step, the mean over ranks and rounds.
        sent_by_machine: bytes that leave a machine per step, the mean likewise.
    """

    method: str
    ranks: int
    step_s: float
    local_s: float
    sent: float
    sent_by_machine: float

    @property
    def exposed_s(self) -> float:
        """Seconds of a step in which communication, or waiting for others, is not hidden by computation."""
        return self.step_s - self.local_s

    @property
    def efficiency(self) -> float:
        """Scaling efficiency: time without communication over time with it."""
        return self.local_s / self.step_s


def predict(
    workload: Workload, network: Network, scheme: Scheme, name: str, *, sigma: float = 0.0, seed: int = 0
) -> Prediction:
    """Simulate a scheme, which tables call `name`, until its rate is steady.

    Args:
        sigma: of the logarithm of compute times; equal seeds draw equal times for all schemes.

    Raises:
        ValueError: `sigma` is negative, or the graph is of another size than the network.
    """
    if not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must be zero or more, got {sigma!r}")
    run = _Run(workload, network, scheme)
    settle = run.cycle * math.ceil(SETTLING / run.cycle)
    steps = run.cycle * math.ceil(LEAST_STEPS[sigma == 0] / run.cycle)
    normal = np.random.default_rng(seed).standard_normal((settle + steps, network.ranks))
    pace = np.exp(sigma * normal - sigma**2 / 2)
    finish = run.finish_times(pace)
    sent, sent_by_machine = run.traffic()
    return Prediction(
        name,
        network.ranks,
        float((finish[-1] - finish[settle - 1]).mean()) / steps,
        run.local_seconds(float(pace[settle:].mean())),
        sent,
        sent_by_machine,
    )


def finish_times(workload: Workload, network: Network, scheme: Scheme, pace: Times) -> Times:
    """When each rank finishes each step, [steps, n], compute times being multiplied by `pace` [steps, n].

    Training begins at 0; messages that the first step needs are sent then.

    Raises:
        ValueError: the graph is of another size than the network.
    """
    return _Run(workload, network, scheme).finish_times(pace)


class _Run:
    """A scheme's ranks: `now` is when each has finished the step before, `free` when its exchanges have."""

    def __init__(self, workload: Workload, network: Network, scheme: Scheme) -> None:
        self.workload, self.network, self.scheme = workload, network, scheme
        self.row, self.every = scheme.row, scheme.communicate_every
        # Machines of one rank have nothing to average, and no means that `step` would have to wait for.
        self.machine_means = scheme.inside == "gradients" and network.local > 1
        self.early_passes = scheme.fused_backward and not self.machine_means
        self.forward_s, self.backward_s = workload.forward_s, workload.backward_s
        self.buckets = scheme.buckets(workload)
        self.mean_buckets = workload.buckets(scheme.bucket_mb, graded=True)
        self.graph = scheme.graph if network.ranks > 1 else None
        self.now, self.free = np.zeros(network.ranks), np.zeros(network.ranks)
        self.arrived = [np.zeros(network.ranks) for _ in self.buckets]
        if self.row.before is None and self._exchanges(0):
            self._exchange([self.now] * len(self.buckets), 0)

    @property
    def cycle(self) -> int:
        """Steps after which everything repeats."""
        return self.every * len(self.rounds) if self.graph is not None else 1

    @cached_property
    def rounds(self) -> list[Meeting]:
        """The rounds of the topology, of ranks or (with a mesh) of machines."""
        if self.graph is None:
            return []
        place = between_machines(self.network) if self.scheme.inside is not None else self.network
        return [meeting(self.graph, t, place) for t in range(self.graph.period or ENDLESS)]

    def finish_times(self, pace: Times) -> Times:
        """See the function of this name."""
        finish = np.empty_like(pace)
        for t, factors in enumerate(pace):
            self._step(t, factors)
            finish[t] = self.now
        return finish

    def _step(self, t: int, pace: Times) -> None:
        if self.scheme.reduces and self.network.ranks > 1:
            self._reduce(pace)
        elif self.row.before is None or self.graph is None:
            self._mix_then_send(t, pace)
        else:
            self._send_then_mix(t, pace)

    def local_seconds(self, pace: float) -> float:
        """A step without communication."""
        workload = self.workload
        own_pass = workload.pass_seconds(workload.size, workload.optimizer_tensors)
        return pace * (self.forward_s + self.backward_s) + own_pass

    def traffic(self) -> tuple[float, float]:
        """Mean bytes per step from a rank, and out of a machine."""
        size, n = self.workload.size, self.network.ranks
        machines, local = self.network.machines, self.network.local
        if self.scheme.reduces and n > 1:
            outside = 2 * (machines - 1) / machines * size if self.scheme.collective == "hierarchical" else None
            around = 2 * (n - 1) / n * size
            return around, (around if machines > 1 else 0.0) if outside is None else outside
        if self.graph is None:
            return 0.0, 0.0
        models = size * len(self.row.messages) * self.scheme.wire_bytes / 4 / self.every
        outside = models * float(np.mean([round_.outside for round_ in self.rounds])) / machines
        if self.scheme.inside is not None:
            within, gradients = (local - 1) / local, 2 * size
            moved = models + (gradients if self.machine_means else models)
            return within * moved + outside / local, outside
        return models * float(np.mean([round_.outgoing.mean() for round_ in self.rounds])), outside

    # -- one step --------------------------------------------------------------------------------------------------------

    def _reduce(self, pace: Times) -> None:
        """Gradients are averaged under backward."""
        after = self.workload.pass_seconds(self.workload.size, self.workload.optimizer_tensors)
        self.now = self._average(pace, self.buckets, self.network) + after

    def _average(self, pace: Times, buckets: Sequence[Bucket], network: Network) -> Times:
        """Forward, and backward that averages gradients over as many consecutive ranks as `network` has; when it has ended."""
        ready = []
        now, at = self.now + pace * self.forward_s, 0.0
        for bucket in buckets:
            now = now + pace * (bucket.ready_s - at) + self._pass(bucket, PACKING)
            at = bucket.ready_s
            ready.append(now.reshape(-1, network.ranks).max(axis=1))
        now = now + pace * (self.backward_s - at)
        end = np.zeros(len(now) // network.ranks)
        for bucket, posted in zip(buckets, ready, strict=True):
            end = np.maximum(end, posted) + allreduce_seconds(network, bucket.size, self.scheme.collective)
        return np.maximum(now, np.repeat(end, network.ranks)) + self.workload.pass_seconds(self.workload.size, PACKING)

    def _compute(self, pace: Times) -> Times:
        """Forward and backward, where no pass is made in backward; when they have ended."""
        if not self.machine_means:
            return self.now + pace * (self.forward_s + self.backward_s)
        inside = self.network.inside or self.network.across
        return self._average(pace, self.mean_buckets, Network(self.network.local, inside))

    def _mix_then_send(self, t: int, pace: Times) -> None:
        """Messages known before forward (awc and kin, and local training): wait, pass, send."""
        waits, sends = self._exchanges(t), self._exchanges(t + 1)
        tensors = self.workload.optimizer_tensors + (self._inbox(t) if waits else 0.0)
        arrived = self.arrived if waits else [np.zeros_like(self.now)] * len(self.buckets)
        posted = [np.zeros_like(self.now) for _ in self.buckets]
        passed = np.zeros(len(self.now), dtype=np.int64)
        now, at = self.now + pace * self.forward_s, 0.0
        for number, bucket in enumerate(self.buckets if self.early_passes else ()):
            now = now + pace * (bucket.ready_s - at)
            at = bucket.ready_s
            # A hook makes the pass of every complete bucket, in order, up to the first whose message has not come yet.
            for b in range(int(passed.min()), number + 1):
                goes = (passed == b) & (arrived[b] <= now)
                now = np.where(goes, now + self._pass(self.buckets[b], tensors), now)
                posted[b] = np.where(goes, now, posted[b])
                passed = passed + goes
        now = now + pace * (self.backward_s - at) if self.early_passes else self._compute(pace)
        for b, bucket in enumerate(self.buckets):
            rest = passed <= b
            now = np.where(rest, np.maximum(now, arrived[b]) + self._pass(bucket, tensors), now)
            posted[b] = np.where(rest, now, posted[b])
        self.now = now
        if sends:
            self._exchange(posted, t + 1)

    def _send_then_mix(self, t: int, pace: Times) -> None:
        """Messages made from gradients (atc and kin): pass, send, all buckets of it; then wait, pass."""
        exchanges = self._exchanges(t)
        posted = []
        now, at = self.now + pace * self.forward_s, 0.0
        for bucket in self.buckets if self.early_passes else ():
            now = now + pace * (bucket.ready_s - at) + self._pass(bucket, self.workload.optimizer_tensors)
            at = bucket.ready_s
            posted.append(now)
        now = now + pace * (self.backward_s - at) if self.early_passes else self._compute(pace)
        for bucket in self.buckets[len(posted) :]:
            now = now + self._pass(bucket, self.workload.optimizer_tensors)
            posted.append(now)
        if exchanges:
            self._exchange(posted, t)
            for bucket, arrived in zip(self.buckets, self.arrived, strict=True):
                now = np.maximum(now, arrived) + self._pass(bucket, 2 + self._inbox(t))
        self.now = now

    # -- exchanging ------------------------------------------------------------------------------------------------------

    def _exchanges(self, t: int) -> bool:
        return self.graph is not None and (t + 1) % self.every == 0

    def _round(self, t: int) -> Meeting:
        return self.rounds[t // self.every % len(self.rounds)]

    def _inbox(self, t: int) -> Times | float:
        """Tensors of the model's size in fp32 that a pass moves for its neighbours' values, and to encode its own."""
        if self.scheme.inside is not None and self.scheme.wire_bytes == 4:
            return float(len(self.row.messages))
        encoding = self.scheme.encoding if self.scheme.wire_bytes != 4 else 0
        incoming = self._round(t).incoming if self.scheme.inside is None else self._of_machines(self._round(t).incoming)
        return len(self.row.messages) * (incoming * self.scheme.wire_bytes / 4 + encoding)

    def _of_machines(self, values: Times) -> Times:
        """One for each rank, of one for each machine."""
        return np.repeat(values, self.network.local)

    def _pass(self, bucket: Bucket, tensors: Times | float) -> Times | float:
        return bucket.size * tensors / self.workload.memory_bandwidth

    def _exchange(self, posted: list[Times], t: int) -> None:
        round_ = self._round(t)
        for b, bucket in enumerate(self.buckets):
            begin = np.maximum(posted[b], self.free)
            size = bucket.size * len(self.row.messages) * self.scheme.wire_bytes / 4
            if self.scheme.inside is not None:
                self.free = finish_by_machine(self.network, round_, begin, size, collects=not self.machine_means)
            else:
                self.free = round_.finish(begin, size)
            self.arrived[b] = self.free
