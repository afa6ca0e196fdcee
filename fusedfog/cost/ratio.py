"""How much longer a step takes in one way than in another, before anybody knows how long computing takes."""

from __future__ import annotations

from fusedfog.cost.network import Network
from fusedfog.cost.timeline import Scheme, predict
from fusedfog.cost.workload import PROFILES, Workload

_INSTANT = 1e-9
"""Seconds of a step that computes nothing to speak of, in which all messages show."""


def step_ratio(one: Scheme, other: Scheme, network: Network, size: float) -> float:
    """The step of `one` over that of `other`, for a model of `size` bytes, where computing takes as long as `other`'s messages.

    There `other` just hides what it can hide. With less to compute the ratio is that of messages; with more it goes to 1.
    """
    compute = messages_alone(other, network, size)
    return _step(one, network, size, compute) / _step(other, network, size, compute)


def messages_alone(scheme: Scheme, network: Network, size: float) -> float:
    """Seconds of a step of this scheme that computes nothing."""
    return _step(scheme, network, size, _INSTANT)


def _step(scheme: Scheme, network: Network, size: float, compute: float) -> float:
    return predict(Workload.profiled(PROFILES["even"](), size, compute), network, scheme, "").step_s
