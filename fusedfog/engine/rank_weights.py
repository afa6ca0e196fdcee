"""What ranks of different weight (`weight=`) multiply gradients or learning rates by. Pure; the engine and `simulate` use it.

With p_i = weight_i / (sum of all), n ranks minimise sum_i p_i f_i, which is the plain mean of the n p_i f_i. So whatever a
doubly stochastic W, or push-sum, does for the plain mean of n losses, it does for the weighted one where

    g_i is n p_i times itself    exact methods stay exact, and the others have the fixed point that they have for n p_i f_i

and the plain mean of the parameters follows sum_i p_i g_i. Coupled weight decay is not multiplied: the mean of
n p_i g_i + c x is sum_i p_i g_i + c x, what data-parallel training has. It does not work where the update u(g) of a rank's
own gradient has no scale, as Adam's: u(n p_i g) = u(g). There

    lr is n p_i times itself     x+ = W x - lr n p_i u_i stands still, but for ranks' differences, where sum_i p_i u_i = 0

with decoupled decay a part of u_i: the mean of n p_i (u_i + c x) is sum_i p_i u_i + c x. The stage that takes the gradient says
which of the two it is (`Stage.scaleless`). Gradient tracking with Adam, and dag, adapt to a mean of gradients, so theirs take
the first. What an optimizer in `Decentralized` makes of gradients is not known: it gets another lr.

Where ranks average gradients, all of them or those of a machine, the mean is weighted; a machine weighs what its ranks do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TypeAlias

from torch import Tensor

RankWeights: TypeAlias = tuple[float, ...]
"""The weight of every rank that trains, by rank; there are none where all are equal."""


def checked(given: object) -> float | None:
    """A rank's own weight, as a user gave it.

    Raises:
        TypeError: it is neither a number nor a tensor of one.
        ValueError: it is not positive or not finite, or a tensor of several.
    """
    if given is None:
        return None
    number = given
    if isinstance(given, Tensor):
        if given.numel() != 1:
            raise ValueError(f"weight is one number, this rank's own, got a tensor of shape {tuple(given.shape)}")
        number = given.item()
    if isinstance(number, bool) or not isinstance(number, Real):
        raise TypeError(f"weight is a number, such as the samples in this rank's batch, or None, got {given!r}")
    weight = float(number)
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(
            f"weight must be positive and finite, got {given!r}: the ranks minimise sum_i weight_i f_i, so one that is not to "
            f"count should not be in the group"
        )
    return weight


def parts(weights: Sequence[float], members: Sequence[int]) -> tuple[float, ...]:
    """What each of these ranks' gradients is multiplied by in a mean over them, so that it is the weighted one."""
    own = [weights[member] for member in members]
    return tuple(len(own) * weight / math.fsum(own) for weight in own)


def part_of_node(weights: Sequence[float], members: Sequence[int], nodes: int) -> float:
    """n p of a node of the graph, one of `nodes`, that is made of these ranks; exactly 1 where all are equal."""
    return nodes * math.fsum(weights[member] for member in members) / math.fsum(weights)


def usable(weights: Sequence[float]) -> RankWeights | None:
    """Ranks' weights, the largest being 1, or None where all are equal: then nothing is multiplied.

    Raises:
        ValueError: a rank would not count beside another one, since it weighs less than 1e-12 of it.
    """
    largest = max(weights)
    for rank, weight in enumerate(weights):
        if weight < 1e-12 * largest:
            other = weights.index(largest)
            raise ValueError(
                f"weight={weight!r} on rank {rank} is nothing beside weight={largest!r} on rank {other}: give the ranks weights "
                f"in the same unit, such as the number of samples in a rank's batch"
            )
    return None if min(weights) == largest else tuple(weight / largest for weight in weights)
