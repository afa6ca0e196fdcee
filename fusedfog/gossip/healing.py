"""A rank whose own values are not finite takes its neighbours' in their place."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fusedfog.gossip.buckets import Inbox, PassGroup
from fusedfog.kernels import device
from fusedfog.params.precision import MASTER

_COPIES = (MASTER, "outer_param")
"""States that stand for parameters."""


def heal(pass_group: PassGroup, messages: Sequence[str], inbox: Inbox) -> bool:
    """Give elements of a rank's own that are not finite values again, before a pass mixes what has come.

    What was sent becomes the neighbours' mean, weighed as they are mixed, over those that are finite; elements that no neighbour
    has stay. Parameters that are no message themselves become the first message, states become zero, and those that stand for
    parameters become these.

    Returns:
        Whether there were such elements; on a GPU, which is not waited for, always true.
    """
    segment, here = pass_group.segment, pass_group.whole
    named = {name: segment.tensor(name)[here] for name in ("param", *messages, *segment.states)}
    if not device.on_gpu(segment.param) and all(map(finite, named.values())):
        return False
    for name, received in zip(messages, inbox.tensors, strict=True):
        own = named[name]
        own.copy_(torch.where(own.isfinite(), own, _mean([one[here] for one in received], inbox.weights, own)))
    param = named["param"]
    if "param" not in messages:
        param.copy_(torch.where(param.isfinite(), param, named[messages[0]].to(param.dtype)))
    for name, state in named.items():
        if name in segment.states and name not in messages:
            fresh = param.to(state.dtype) if name in _COPIES else torch.zeros_like(state)
            state.copy_(torch.where(state.isfinite(), state, fresh))
    return True


def finite(tensor: Tensor) -> bool:
    """Whether all of a tensor on the CPU is; a sum tells it in one look, and one that overflows is looked at again."""
    return math.isfinite(tensor.sum().item()) or bool(tensor.isfinite().all())


def _mean(received: Sequence[Tensor], weights: Sequence[float], own: Tensor) -> Tensor:
    """The weighted mean of finite elements, NaN where there is none."""
    total = torch.zeros_like(own, dtype=torch.float64 if own.dtype == torch.float64 else torch.float32)
    mass = torch.zeros_like(total)
    for one, weight in zip(received, weights, strict=True):
        if weight:
            finite = one.isfinite()
            total += torch.where(finite, one, 0.0).to(total.dtype) * weight
            mass += finite * weight
    return torch.where(mass != 0, total / mass, torch.nan).to(own.dtype)
