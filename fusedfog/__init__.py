"""fusedfog: decentralized training for PyTorch, neighbour averaging fused with the optimizer step."""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from fusedfog import ops, topology
from fusedfog.algorithm import Outer
from fusedfog.comm.elastic.run import Change
from fusedfog.comm.group import is_main, rank, world_size
from fusedfog.comm.join import init
from fusedfog.comm.subgroup import new_group
from fusedfog.errors import (
    CheckpointError,
    DivergedError,
    ExchangeError,
    ForeignCheckpointWarning,
    LaunchError,
    Minority,
    MismatchError,
    MismatchWarning,
    NonFiniteError,
    NonFiniteWarning,
    PeerTimeout,
    RankLeft,
    StorageReplacedError,
    StoreLost,
    TornMessageWarning,
    UnsupportedEnvironment,
)
from fusedfog.ops import (
    Window,
    Work,
    agree,
    allreduce_parameters,
    broadcast_optimizer_state,
    broadcast_parameters,
    hierarchical_neighbor_allreduce,
    mean,
    neighbor_allgather,
    neighbor_allreduce,
    pair_gossip,
)
from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.optim.checkpoint import load_checkpoint, save_checkpoint
from fusedfog.optim.ddp import local_gradients
from fusedfog.optim.optimizers import SGD, AccumAdamW, Adam, AdamW
from fusedfog.optim.wrapper import Decentralized
from fusedfog.sampling import elastic_sampler
from fusedfog.topology import Topology
from fusedfog.watch import Monitor, monitor

if TYPE_CHECKING:
    from fusedfog import plan, simulate, testing

__all__ = [
    "SGD",
    "AccumAdamW",
    "Adam",
    "AdamW",
    "Change",
    "CheckpointError",
    "Decentralized",
    "DecentralizedOptimizer",
    "DivergedError",
    "ExchangeError",
    "ForeignCheckpointWarning",
    "LaunchError",
    "Minority",
    "MismatchError",
    "MismatchWarning",
    "Monitor",
    "NonFiniteError",
    "NonFiniteWarning",
    "Outer",
    "PeerTimeout",
    "RankLeft",
    "StorageReplacedError",
    "StoreLost",
    "Topology",
    "TornMessageWarning",
    "UnsupportedEnvironment",
    "Window",
    "Work",
    "agree",
    "allreduce_parameters",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "elastic_sampler",
    "hierarchical_neighbor_allreduce",
    "init",
    "is_main",
    "load_checkpoint",
    "local_gradients",
    "mean",
    "monitor",
    "neighbor_allgather",
    "neighbor_allreduce",
    "new_group",
    "ops",
    "pair_gossip",
    "plan",
    "rank",
    "save_checkpoint",
    "simulate",
    "testing",
    "topology",
    "world_size",
]

_AT_FIRST_USE = ("plan", "simulate", "testing")
"""Training needs none of them, so `import fusedfog` does not wait for them."""


def _version() -> str:
    try:
        return importlib.metadata.version("fusedfog")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"  # a source tree that was never installed


__version__ = _version()


def __getattr__(name: str) -> Any:
    if name in _AT_FIRST_USE:
        return importlib.import_module(f"fusedfog.{name}")
    raise AttributeError(f"module 'fusedfog' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
