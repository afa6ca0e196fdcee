"""What `topology="auto"` would choose on a network, in words: the optimizers' own choice, asked without ranks."""

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


def explain_auto(workload: Workload, network: Network, algorithm: str | None = None) -> str:
    """Such as "topology='auto' takes one_peer_exponential over 4 machines of 2 ranks: ...", of AWC if no algorithm is named.

    Nothing for algorithms without a topology.
    """
    name = "allreduce" if algorithm == "ddp" else algorithm or "awc"
    family = next(family for family in ("SGD", "Adam") if name in TABLE[family])
    options = Options(
        algorithm=name, links=Links(network.local, network.inside, network.across, workload.memory_bandwidth)
    )
    model = torch.nn.Parameter(torch.empty(round(workload.size / 4), device="meta"))
    setup = Setup(family, TABLE[family][name], vars(options), [{"params": [model]}], ranks=network.ranks)
    flat = choose_topology(setup, None, network.ranks)
    machines = [str(rank // network.local) for rank in range(network.ranks)]
    way = way_of(setup, options, flat, machines, bool)
    if way.topology is None:
        return ""
    over = f" over {network.machines} machines of {network.local} ranks" if way.machines is not None else ""
    return f"topology='auto' takes {way.topology.name}{over}: {way.reason.removeprefix('auto: ')}"
