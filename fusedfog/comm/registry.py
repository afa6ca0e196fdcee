"""The communicators there are: one for each set of ranks and device, made at its first use, closed with the process."""

from __future__ import annotations

import atexit

import torch
import torch.distributed as dist

from fusedfog.comm import calls
from fusedfog.comm.agreement import confer, next_agreement
from fusedfog.comm.calls import current_call
from fusedfog.comm.communicator import LAST_MOMENT, Communicator
from fusedfog.comm.failures import Origin
from fusedfog.comm.group import GroupView, group_timeout
from fusedfog.comm.membership import CannotGoOn
from fusedfog.kernels import device


@atexit.register
def close_all(patience: float = LAST_MOMENT) -> None:
    """Close all communicators of the current world; what is in flight gets `patience` seconds."""
    if _Registry.default is not None:
        for communicator in _Registry.communicators.values():
            communicator.close(patience)
        _Registry.communicators.clear()
        _Registry.default = None


def hear_all(origin: Origin) -> None:
    """No exchange of the current world will be complete: whoever waits in one wakes, and the next call raises; for any thread."""
    for communicator in list(_Registry.communicators.values()) if _Registry.default is not None else ():
        calls.note_ended(communicator.name, origin)
        communicator.hear(origin)


class _Registry:
    """The communicators of the current world; a new world (destroy, init again) starts afresh."""

    default: dist.ProcessGroup | None = None
    communicators: dict[tuple[object, ...], Communicator]


def _current() -> _Registry:
    default = dist.distributed_c10d._get_default_group()
    if _Registry.default is not default:
        _Registry.default, _Registry.communicators = default, {}
    return _Registry()


def communicator_for(
    view: GroupView, place: torch.device, comm_sms: int | None = None, number: int = 0
) -> Communicator:
    """The communicator of this group's ranks for tensors on `place`; made at its first use, by all of them together.

    Args:
        comm_sms: how many SMs its kernels may take; communicators with different limits are different ones.
        number: another one beside the first, whose operations do not wait for those of the first.
    """
    known = _current().communicators
    key = (view.ranks, str(place), comm_sms if device.on_gpu(place) else None, number)
    if key not in known or known[key].ended is not None:
        if number:
            # torch's own wait for a new group names nobody, and leaves a rank that gave up out of step with the others' groups.
            what = "opening a communicator"
            confer(
                view,
                next_agreement(view),
                None,
                lambda _: None,
                group_timeout(view, place),
                what,
                current_call() or what,
            )
        if key in known and known[key].ends_at_once:
            known[key].close(0.0)  # Another rank ended it, perhaps.
        known[key] = Communicator(view, place, comm_sms)
    return known[key]


def leave(communicator: Communicator, steps: int, reason: CannotGoOn | None = None) -> None:
    """Tell the other ranks that this one exchanges nothing more, deliver what was sent, and end the communicator.

    Communicators among some of these ranks, those of a mesh, end with it.

    Args:
        reason: why it cannot go on, which the others raise too; None if it leaves of its own will.
    """
    view = communicator.view
    ended = reason or RuntimeError(f"rank {view.rank} has left (opt.leave()); to train on, build a new optimizer")
    for other in _current().communicators.values():
        if set(other.view.ranks) <= set(view.ranks):
            other.membership.note_leaving(steps, reason)
            other.end(ended, LAST_MOMENT)
