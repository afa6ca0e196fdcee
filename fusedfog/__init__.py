"""fusedfog: decentralized training for PyTorch, neighbour averaging fused with the optimizer step."""

from fusedfog import ops, topology
from fusedfog.algorithms import Outer
from fusedfog.comm.group import init
from fusedfog.comm.subgroup import new_group
from fusedfog.errors import (
    ExchangeError,
    ForeignCheckpointWarning,
    MismatchError,
    NonFiniteError,
    NonFiniteWarning,
    PeerTimeout,
    RankLeft,
    StorageReplacedError,
    TornMessageWarning,
    UnsupportedEnvironment,
)
from fusedfog.ops import (
    Work,
    allreduce_parameters,
    broadcast_optimizer_state,
    broadcast_parameters,
    hierarchical_neighbor_allreduce,
    neighbor_allgather,
    neighbor_allreduce,
    pair_gossip,
)
from fusedfog.optim.checkpoint import load_checkpoint, save_checkpoint
from fusedfog.optim.ddp import local_gradients
from fusedfog.optim.optimizers import SGD, AccumAdamW, Adam, AdamW
from fusedfog.optim.wrapper import Decentralized
from fusedfog.topology import Topology

__all__ = [
    "SGD",
    "AccumAdamW",
    "Adam",
    "AdamW",
    "Decentralized",
    "ExchangeError",
    "ForeignCheckpointWarning",
    "MismatchError",
    "NonFiniteError",
    "NonFiniteWarning",
    "Outer",
    "PeerTimeout",
    "RankLeft",
    "StorageReplacedError",
    "Topology",
    "TornMessageWarning",
    "UnsupportedEnvironment",
    "Work",
    "allreduce_parameters",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "hierarchical_neighbor_allreduce",
    "init",
    "load_checkpoint",
    "local_gradients",
    "neighbor_allgather",
    "neighbor_allreduce",
    "new_group",
    "ops",
    "pair_gossip",
    "save_checkpoint",
    "topology",
]
