"""Ways to train by the names that users know them by, checked as the optimizers check them; `cost.timeline` simulates them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusedfog.algorithm import Algorithm
from fusedfog.algorithms import TABLE
from fusedfog.cost import timeline
from fusedfog.cost.loss import Way
from fusedfog.cost.network import Collective, Network, Times
from fusedfog.cost.timeline import Inside, Prediction, Scheme, wire_bytes
from fusedfog.cost.workload import Bucket, Workload
from fusedfog.optim.compatibility import check, choose_topology
from fusedfog.optim.features import Setup
from fusedfog.topology import Topology


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        algorithm: "ddp" (torch's DistributedDataParallel) or an algorithm of `fusedfog.algorithms`.
        topology: for algorithms that have one; None takes the algorithm's default. With `mesh`, of machines.
        collective: how an all-reduce is done.
        mesh: machines are nodes (`mesh=` of the optimizers, and what `topology="auto"` makes of them).
        inside: what the ranks of a machine average then, as in the optimizers.
        label: what tables call it; None describes it.
        wire: `wire_dtype` of the optimizers, by name; None sends fp32 parameters as they are.
        start: the part of all steps that are data-parallel, before the algorithm takes over (`data_parallel_steps`).

    Raises:
        ValueError: an unknown algorithm or wire, or options that the algorithm refuses.
    """

    algorithm: str
    topology: Topology | str | None = None
    collective: Collective = "ring"
    fused_backward: bool = False
    communicate_every: int = 1
    mesh: bool = False
    bucket_mb: float = 25
    label: str | None = None
    inside: Inside = "gradients"
    wire: str | None = None
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.communicate_every < 1:
            raise ValueError(f"communicate_every must be at least 1, got {self.communicate_every}")
        if not 0 <= self.start < 1:
            raise ValueError(f"start is a part of all steps, from 0 to less than 1, got {self.start}")
        wire_bytes(self.wire)
        check(self._setup)
        if self.communicate_every > 1 and self.reduces:
            raise ValueError(f"{self.algorithm} reduces gradients in every step; communicate_every is for awc and atc")

    @property
    def row(self) -> Algorithm:
        """The algorithm's row of the table; "ddp" has that of allreduce."""
        rows = {**TABLE["Adam"], **TABLE["SGD"]}
        name = "allreduce" if self.algorithm == "ddp" else self.algorithm
        if name not in rows:
            raise ValueError(f"unknown algorithm {self.algorithm!r}; there are ddp, {', '.join(rows)}")
        return rows[name]

    @property
    def reduces(self) -> bool:
        """Whether gradients travel, to everyone."""
        return self.row.exchanges == "gradients"

    def buckets(self, workload: Workload) -> list[Bucket]:
        """See `Scheme.buckets`."""
        return self._scheme(None).buckets(workload)

    @property
    def name(self) -> str:
        """The label, or the options in words."""
        if self.label is not None:
            return self.label
        shape = self.topology if isinstance(self.topology, str) else self.topology.name if self.topology else None
        words = ["DDP" if self.algorithm == "ddp" else self.algorithm]
        words += [f"({self.collective})"] if self.reduces else [shape] if shape is not None else []
        words += ["by machine"] * self.mesh + ["(parameters)"] * (self.mesh and self.inside == "parameters")
        words += ["fused_backward"] * self.fused_backward + [f"H={self.communicate_every}"] * (
            self.communicate_every > 1
        )
        words += [self.wire or ""] * (self.wire is not None) + [f"start {self.start:.0%}"] * (self.start > 0)
        return " ".join(words)

    def graph(self, network: Network) -> Topology | None:
        """The topology on this network; None for methods without one.

        Raises:
            ValueError: it does not fit the network or the algorithm.
        """
        return choose_topology(self._setup, self.topology, network.machines if self.mesh else network.ranks)

    def scheme(self, network: Network) -> Scheme:
        """What is simulated on this network; raises as `graph`."""
        return self._scheme(self.graph(network) if network.ranks > 1 else None)

    def _scheme(self, graph: Topology | None) -> Scheme:
        return Scheme(
            self.row,
            graph,
            self.collective,
            fused_backward=self.fused_backward,
            communicate_every=self.communicate_every,
            inside=self.inside if self.mesh else None,
            bucket_mb=self.bucket_mb,
            wire_bytes=wire_bytes(self.wire),
            ddp=self.algorithm == "ddp",
        )

    def loss_way(self, network: Network, optimizer: str = "AdamW") -> Way | None:
        """What the loss depends on, with "AdamW" or "SGD"; None for methods whose loss is known, or not in the table's terms."""
        graph = self.graph(network)
        if (
            self.communicate_every > 1
            or graph is None
            or network.ranks == 1
            or (self.mesh and self.inside == "parameters")
        ):
            return None
        return Way(optimizer, self.algorithm, graph.name, self.mesh, self.wire, self.start > 0)

    @property
    def _setup(self) -> Setup:
        family = next(family for family in ("SGD", "Adam") if self.row.name in TABLE[family])
        given = {
            "communicate_every": self.communicate_every,
            "mesh": "machines" if self.mesh else None,
            "inside": self.inside,
            "wire_dtype": self.wire,
            "data_parallel_steps": int(self.start > 0),
        }
        return Setup(family, TABLE[family][self.row.name], given, ranks=2)


def predict(workload: Workload, network: Network, method: Method, *, sigma: float = 0.0, seed: int = 0) -> Prediction:
    """Simulate a method until its rate is steady. With a data-parallel start the numbers are means over all steps.

    Args:
        sigma: of the logarithm of compute times; equal seeds draw equal times for all methods.

    Raises:
        ValueError: `sigma` is negative, or the method does not fit the network.
    """
    later = timeline.predict(workload, network, method.scheme(network), method.name, sigma=sigma, seed=seed)
    if not method.start:
        return later
    first = predict(workload, network, Method("allreduce", collective=method.collective), sigma=sigma, seed=seed)
    mixed = {
        name: method.start * getattr(first, name) + (1 - method.start) * getattr(later, name)
        for name in ("step_s", "local_s", "sent", "sent_by_machine")
    }
    return replace(later, **mixed)


def finish_times(workload: Workload, network: Network, method: Method, pace: Times) -> Times:
    """When each rank finishes each step, [steps, n], compute times being multiplied by `pace` [steps, n].

    Training begins at 0; messages that the first step needs are sent then. A data-parallel start is left out.

    Raises:
        ValueError: the method does not fit the network.
    """
    return timeline.finish_times(workload, network, method.scheme(network), pace)
