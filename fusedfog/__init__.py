"""fusedfog: decentralized training for PyTorch, neighbour averaging fused with the optimizer step."""

from fusedfog import topology
from fusedfog.errors import ExchangeError, MismatchError, PeerTimeout, StorageReplacedError, TornMessageWarning
from fusedfog.optim import SGD, Adam, AdamW
from fusedfog.topology import Topology
from fusedfog.world import init

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "ExchangeError",
    "MismatchError",
    "PeerTimeout",
    "StorageReplacedError",
    "Topology",
    "TornMessageWarning",
    "init",
    "topology",
]
