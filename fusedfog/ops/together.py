"""What ranks decide together in a training loop: the mean of a metric, and whether any rank wants to stop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.comm.agreement import agree as agree_on_fields
from fusedfog.comm.agreement import confer, next_agreement
from fusedfog.comm.averaging import average_in_place
from fusedfog.comm.calls import collective
from fusedfog.comm.elastic.again import made_again
from fusedfog.comm.group import find_group, group_timeout, store_timeout
from fusedfog.ops.neighbors import open_communicator
from fusedfog.ops.tensors import check_dense, describe


@overload
def mean(x: Tensor, group: dist.ProcessGroup | None = None) -> Tensor: ...
@overload
def mean(x: float, group: dist.ProcessGroup | None = None) -> float: ...
@made_again
@collective("mean()")
@torch.no_grad()
def mean(x: Tensor | float, group: dist.ProcessGroup | None = None) -> Tensor | float:
    """The mean of x over all ranks, the same to the last bit on each. Collective; every rank waits for all others.

    For metrics, and for what must be equal everywhere: `schedule.step(fusedfog.mean(loss))` keeps ReduceLROnPlateau's learning
    rates together. Numbers, and tensors of one element, travel through the process group's store, a millisecond or so, on
    whatever device they are; larger tensors through the group, 16-bit ones summed in float32.

    Args:
        x: a number, or a floating-point tensor of any shape; of one shape and dtype on all ranks. Never modified.
        group: process group, None for the default one.

    Returns:
        A float for a number; for a tensor a new one of its shape, dtype and device, outside of autograd. In a world of one rank
        without a process group, x itself as such.

    Raises:
        TypeError: a tensor that is not floating-point or dense.
        RuntimeError: no process group although WORLD_SIZE is larger than one.
        MismatchError: shapes or dtypes differ between ranks, or another rank is in another call; names them.
        PeerTimeout, ExchangeError: a rank did not come, or has gone; says who is where.
    """
    if isinstance(x, Tensor):
        check_dense(x, "mean")
        if not x.is_floating_point():
            raise TypeError(f"mean takes floating-point tensors, not {describe(x)}: convert it (x.float())")
    view = find_group(group)
    if not isinstance(x, Tensor) or x.numel() == 1:
        value = float(x)
        if view.size > 1:
            value = confer(view, next_agreement(view), value, _mean_of, store_timeout(view), "mean", "mean()")
        return x.new_full(x.shape, value) if isinstance(x, Tensor) else value
    result = x.detach().clone(memory_format=torch.contiguous_format)
    if view.size > 1:
        communicator = open_communicator(view, x.device)
        fields = {"x": f"{describe(x)} on {x.device.type}"}
        agree_on_fields(view, next_agreement(view), fields, group_timeout(view, x.device), "mean", "mean()")
        average_in_place([result.view(-1)], communicator)
    return result


@made_again
@collective("agree()")
def agree(flag: bool | Tensor, group: dist.ProcessGroup | None = None) -> bool:
    """Whether `flag` is true on any rank, the same answer on each. Collective; every rank waits for all others.

    One rank's view counts for all, so that they stop together: `if fusedfog.agree(patience_is_over): break`. Whether it is
    true on *all* ranks is `not agree(not flag)`.

    Args:
        flag: whatever `bool` takes, also a tensor of one element.
        group: process group, None for the default one.

    Raises:
        RuntimeError: no process group although WORLD_SIZE is larger than one.
        MismatchError: another rank is in another call; names both.
        PeerTimeout, ExchangeError: a rank did not come, or has gone; says who is where.
    """
    own, view = bool(flag), find_group(group)
    if view.size == 1:
        return own
    return bool(confer(view, next_agreement(view), own, any, store_timeout(view), "agree", "agree()"))


def _mean_of(values: Sequence[float]) -> float:
    # fsum refuses infinities of both signs, whose mean is NaN.
    total = math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
    return total / len(values)
