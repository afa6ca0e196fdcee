"""The numbers that a rule takes, by name, and from a torch param group to them; shared by the CPU and the GPU path.

A rule's numbers are a named tuple of floats, the type of `hyper` in its function in `reference`. Whoever makes a pass may
give a plain tuple in the same order: rules see names. Differences such as `1 - beta` and logarithms are formed here in
double: rounding beta to fp32 first would cost them up to 1.3e-5 relative for 0.999. Python floats reach the GPU as fp32
values, never as part of the compile key.

Everywhere `sign` is -1 with `maximize` and 1 without, and `nesterov` and `active` are 1 or 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor


class Sgd(NamedTuple):
    """torch.optim.SGD's; `undamped` is 1 - dampening."""

    lr: float
    momentum: float
    undamped: float
    decay: float
    sign: float
    nesterov: float


class Adam(NamedTuple):
    """torch.optim.Adam's and AdamW's; `undecayed` is 1 - beta, and decay is either coupled or decoupled.

    The logarithms give the GPU an accurate bias correction, `1 - beta^t = -expm1(t log beta)`; log 0 is -inf.
    """

    lr: float
    beta1: float
    undecayed1: float
    beta2: float
    undecayed2: float
    log_beta1: float
    log_beta2: float
    eps: float
    coupled: float
    decoupled: float
    sign: float


class AccumAdam(NamedTuple):
    """Adam's, and every how many steps the moments move."""

    lr: float
    beta1: float
    undecayed1: float
    beta2: float
    undecayed2: float
    log_beta1: float
    log_beta2: float
    eps: float
    coupled: float
    decoupled: float
    sign: float
    period: float


class QuasiGlobalAdam(NamedTuple):
    """Adam's, and 1/|the model's last move|, or 0 for none; on stacked ranks that may be a tensor [n, 1]."""

    lr: float
    beta1: float
    undecayed1: float
    beta2: float
    undecayed2: float
    log_beta1: float
    log_beta2: float
    eps: float
    coupled: float
    decoupled: float
    sign: float
    inverse_norm: float | Tensor


Adams = Adam | AccumAdam | QuasiGlobalAdam
"""What has all of Adam's numbers."""


class Descent(NamedTuple):
    """Of the pass before `decentlam` and `dag`; for Adam, decay is the coupled one."""

    lr: float
    decay: float
    sign: float


class DecentLam(NamedTuple):
    """`carry` is momentum*lr/(lr of the step before); `active` is 0 for a step with lr = 0, which only mixes."""

    carry: float
    active: float


class QuasiGlobalSgd(NamedTuple):
    """Of the pass before `quasi_global`."""

    lr: float
    momentum: float
    decay: float
    sign: float
    nesterov: float


class QuasiGlobal(NamedTuple):
    """`undecayed` is 1 - mu."""

    lr: float
    mu: float
    undecayed: float


class Tracking(NamedTuple):
    """Of gradient and momentum tracking."""

    lr: float
    momentum: float
    decay: float
    sign: float


class Active(NamedTuple):
    """Whether lr is not 0."""

    active: float


class Outer(NamedTuple):
    """Of the outer step of DiLoCo and NoLoCo."""

    lr: float
    momentum: float
    nesterov: float


def sgd_hyper(group: Mapping[str, Any]) -> Sgd:
    """The numbers of the rule `sgd`.

    Args:
        group: a `torch.optim.SGD` param group; a tensor `lr` must have been converted by the caller.

    Raises:
        KeyError: if the group lacks one of torch's options.
    """
    return Sgd(
        lr=float(group["lr"]),
        momentum=float(group["momentum"]),
        undamped=1.0 - float(group["dampening"]),
        decay=float(group["weight_decay"]),
        sign=-1.0 if group["maximize"] else 1.0,
        nesterov=1.0 if group["nesterov"] else 0.0,
    )


def adam_hyper(group: Mapping[str, Any]) -> Adam:
    """The numbers of the rule `adam`, for Adam (coupled decay) and AdamW (decoupled).

    Args:
        group: a `torch.optim.Adam` or `AdamW` param group; decoupled if its `decoupled_weight_decay` is true. A tensor
            `lr` or beta must have been converted by the caller.

    Raises:
        KeyError: if the group lacks one of torch's options.
    """
    beta1, beta2 = map(float, group["betas"])
    decay, decoupled = float(group["weight_decay"]), bool(group["decoupled_weight_decay"])
    return Adam(
        lr=float(group["lr"]),
        beta1=beta1,
        undecayed1=1.0 - beta1,
        beta2=beta2,
        undecayed2=1.0 - beta2,
        log_beta1=_log(beta1),
        log_beta2=_log(beta2),
        eps=float(group["eps"]),
        coupled=0.0 if decoupled else decay,
        decoupled=decay if decoupled else 0.0,
        sign=-1.0 if group["maximize"] else 1.0,
    )


def _log(value: float) -> float:
    return math.log(value) if value else -math.inf
