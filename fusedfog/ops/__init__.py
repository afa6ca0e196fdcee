"""Communication on plain tensors: what BlueFog offers as operations, on `torch.distributed`.

    y = neighbor_allreduce(x, "ring")                                   # one round of x <- W x
    y = neighbor_allreduce(x, self_weight=0.5, recv_weights={3: 0.5}, send_weights=[1])     # this step's own edges
    work = neighbor_allreduce(x, topology, step, async_op=True); ...; y = work.wait()

Every rank of the group calls the same operations in the same order. With `check=True`, the default, a call begins with one
small all-reduce, in which wrong or disagreeing arguments of any rank are found before data moves: all ranks of the group
then raise, and none hangs. With `check=False` it is left out, on all ranks or on none.
"""

from fusedfog.ops.hierarchical import hierarchical_neighbor_allreduce
from fusedfog.ops.neighbors import neighbor_allgather, neighbor_allreduce, pair_gossip
from fusedfog.ops.state import allreduce_parameters, broadcast_optimizer_state, broadcast_parameters
from fusedfog.ops.together import agree, mean
from fusedfog.ops.window import Window
from fusedfog.ops.work import Work

__all__ = [
    "Window",
    "Work",
    "agree",
    "allreduce_parameters",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "hierarchical_neighbor_allreduce",
    "mean",
    "neighbor_allgather",
    "neighbor_allreduce",
    "pair_gossip",
]
