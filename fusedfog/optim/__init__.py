"""What a user builds: optimizers, and everything that has to do with building, saving and restoring them."""

from fusedfog.optim.optimizers import SGD, AccumAdamW, Adam, AdamW
from fusedfog.optim.wrapper import Decentralized

__all__ = ["SGD", "AccumAdamW", "Adam", "AdamW", "Decentralized"]
