"""States for `torch.distributed.checkpoint`, which makes a step with zero gradients to have some. Ours must not be one.

`get_optimizer_state_dict` and `set_optimizer_state_dict` call `step(closure=None)`, with zero gradients and lr 0, on an optimizer
whose `state` is empty: before the first step, and at any time for one without states, as SGD without momentum. A step is
a message to the neighbours, and rank 0 that saves alone would wait for theirs.
"""

from __future__ import annotations

import sys

from fusedfog.engine.scheduler import Scheduler
from fusedfog.gossip.compression import own_states
from fusedfog.optim.states import States, show_states

_MODULE = "torch.distributed.checkpoint.state_dict"
_FUNCTION = "_init_optim_state"
_DEPTH = 12
"""Frames between torch's function and `step`: profiling, a schedule's counter, grad mode."""


def wants_states_only() -> bool:
    """Whether the `step` that calls this is torch's, made for the sake of states. Only asked while there are none."""
    if _MODULE not in sys.modules:
        return False
    frame = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame.f_code.co_name == _FUNCTION and frame.f_globals.get("__name__") == _MODULE:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def make_states(engine: Scheduler, shown: States) -> None:
    """Give every parameter with a gradient the states that it has before its first update. Local."""
    for segment in engine.segments:
        segment.found_gradients(0, len(segment.params))
        if not engine.algorithm.plain or own_states(segment, engine.channels):
            segment.touch_all()
    show_states(engine, shown)
