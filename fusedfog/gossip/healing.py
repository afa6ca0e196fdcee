"""A rank whose own values are not finite takes its neighbours' in their place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fusedfog.comm.finite import all_finite, restore
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
    if not device.on_gpu(segment.param) and all(map(all_finite, named.values())):
        return False
    for name, received in zip(messages, inbox.tensors, strict=True):
        own = named[name]
        restore(own, [one[here] for one in received], inbox.weights)
    param = named["param"]
    if "param" not in messages:
        param.copy_(torch.where(param.isfinite(), param, named[messages[0]].to(param.dtype)))
    for name, state in named.items():
        if name in segment.states and name not in messages:
            fresh = param.to(state.dtype) if name in _COPIES else torch.zeros_like(state)
            state.copy_(torch.where(state.isfinite(), state, fresh))
    return True
