"""What `topology="auto"` would choose on a network: the optimizers' own choice, asked without ranks."""

from __future__ import annotations

import torch

from fusedfog.algorithms import TABLE
from fusedfog.cost.links import Links
from fusedfog.cost.network import Network
from fusedfog.cost.workload import Workload
from fusedfog.optim.automatic import way_of
from fusedfog.optim.compatibility import choose_topology
from fusedfog.optim.features import Setup
from fusedfog.optim.options import Options
from fusedfog.plan.methods import Method


def explain_auto(
    workload: Workload, network: Network, algorithm: str | None = None, optimizer: str = "AdamW"
) -> tuple[str, Method | None]:
    """Such as "topology='auto' takes one_peer_exponential over 4 machines of 2 ranks: ...", of AWC if no algorithm is named.

    Args:
        optimizer: "AdamW" or "SGD", for the loss.

    Returns:
        The choice in words, and as a method; "" and None for algorithms without a topology.
    """
    name = "allreduce" if algorithm == "ddp" else algorithm or "awc"
    families = ("SGD", "Adam") if optimizer == "SGD" else ("Adam", "SGD")
    family = next(family for family in families if name in TABLE[family])
    options = Options(
        algorithm=name, links=Links(network.local, network.inside, network.across, workload.memory_bandwidth)
    )
    model = torch.nn.Parameter(torch.empty(round(workload.size / 4), device="meta"))
    setup = Setup(family, TABLE[family][name], vars(options), [{"params": [model]}], ranks=network.ranks)
    flat = choose_topology(setup, None, network.ranks)
    machines = [str(rank // network.local) for rank in range(network.ranks)]
    way = way_of(setup, options, flat, machines, lambda find: find(), workload=workload)
    if way.topology is None:
        return "", None
    over = f" over {network.machines} machines of {network.local} ranks" if way.machines is not None else ""
    wire = f", {way.wire} messages" if way.wire is not None else ""
    method = Method(name, way.topology, mesh=way.machines is not None, wire=way.wire)
    return f"topology='auto' takes {way.topology.name}{over}{wire}: {way.reason.removeprefix('auto: ')}", method
