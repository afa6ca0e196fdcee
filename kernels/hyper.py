"""From a torch param group to the tuple of floats that a rule takes; shared by the CPU and the GPU path.

Differences such as `1 - beta` and logarithms are formed here in double: rounding beta to fp32 first would cost them up
to 1.3e-5 relative for 0.999. Python floats reach the GPU as fp32 values, never as part of the compile key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def sgd_hyper(group: Mapping[str, Any]) -> tuple[float, ...]:
    """The hyper tuple of the rule `sgd`: (lr, momentum, 1 - dampening, weight_decay, sign, nesterov).

    Args:
        group: a `torch.optim.SGD` param group; a tensor `lr` must have been converted by the caller.

    Returns:
        Six floats; sign is -1 with `maximize` and 1 without, nesterov is 1 or 0.

    Raises:
        KeyError: if the group lacks one of torch's options.
    """
    return (
        float(group["lr"]),
        float(group["momentum"]),
        1.0 - float(group["dampening"]),
        float(group["weight_decay"]),
        -1.0 if group["maximize"] else 1.0,
        1.0 if group["nesterov"] else 0.0,
    )


def adam_hyper(group: Mapping[str, Any]) -> tuple[float, ...]:
    """The hyper tuple of the rule `adam`, for Adam (coupled decay) and AdamW (decoupled).

    The order is (lr, beta1, 1 - beta1, beta2, 1 - beta2, log beta1, log beta2, eps, coupled_decay, decoupled_decay,
    sign). The logarithms give the GPU an accurate bias correction, `1 - beta^t = -expm1(t log beta)`; log 0 is -inf.

    Args:
        group: a `torch.optim.Adam` or `AdamW` param group; decoupled if its `decoupled_weight_decay` is true. A tensor
            `lr` or beta must have been converted by the caller.

    Returns:
        Eleven floats; sign is -1 with `maximize` and 1 without.

    Raises:
        KeyError: if the group lacks one of torch's options.
    """
    beta1, beta2 = (float(beta) for beta in group["betas"])
    decay, decoupled = float(group["weight_decay"]), bool(group["decoupled_weight_decay"])
    return (
        float(group["lr"]),
        beta1,
        1.0 - beta1,
        beta2,
        1.0 - beta2,
        _log(beta1),
        _log(beta2),
        float(group["eps"]),
        0.0 if decoupled else decay,
        decay if decoupled else 0.0,
        -1.0 if group["maximize"] else 1.0,
    )


def _log(value: float) -> float:
    return math.log(value) if value else -math.inf
