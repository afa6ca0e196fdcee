"""How parameters of 16 bits and states are kept, as plain data, which passes honour."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

Way: TypeAlias = Literal["master", "kahan", "stochastic"]
WAYS: tuple[str, ...] = get_args(Way)

MASTER, COMPENSATION = "master_param", "compensation"
"""States that hold what 16-bit parameters lack."""

MOMENTS = frozenset({"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "accumulator"})
"""States that may be bf16: averages of gradients, in which noise averages out. Others carry sums that must be exact."""


@dataclass(frozen=True)
class Storage:
    """Which way 16-bit parameters keep what they cannot hold, and the dtype of moments.

        master       x is an fp32 copy, the parameter x rounded             4 bytes an element more, 8 of traffic
        kahan        x = parameter + compensation, both of 16 bits          2 bytes more, 4 of traffic
        stochastic   x is the parameter; rounded up or down at random, right on average      nothing more
        None         x is the parameter, rounded to nearest: updates below half its spacing are lost

    bf16 moments are rounded stochastically whatever the way: to nearest, a second moment would never shrink, for in one
    step it loses at most 1 - beta2 of itself, less than half of bf16's spacing.
    """

    way: Way | None = None
    states: torch.dtype = torch.float32

    @property
    def remainder(self) -> str | None:
        """The state that 16-bit parameters need."""
        return {"master": MASTER, "kahan": COMPENSATION}.get(self.way or "")


EXACT = Storage()
