"""The keywords that every optimizer takes, as fields, each checked by itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any, Literal, TypeAlias, TypedDict, get_args

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fusedfog.algorithm import Outer
from fusedfog.cost.links import Links, links_of
from fusedfog.cost.network import Network
from fusedfog.engine.mix_strength import MixStrength, Strength
from fusedfog.engine.rank_weights import checked
from fusedfog.engine.rhythm import Rhythm, check_rhythm
from fusedfog.errors import did_you_mean
from fusedfog.kernels.wire import wire_format
from fusedfog.params.precision import WAYS, Storage, Way
from fusedfog.topology import Topology

NonFinite: TypeAlias = Literal["contain", "skip", "heal", "propagate"]
"""What becomes of values that are not finite; `DecentralizedOptimizer` explains them."""


Inside: TypeAlias = Literal["gradients", "parameters"]
"""What the ranks of a machine average: their gradients, so that it is one node of the graph, or their parameters."""

EXACT = "exact"
"""A `wire_dtype` that asks for messages as they are, also where auto would choose smaller ones."""

_WIRES = {"bfloat16": "bf16", "float8": "fp8", "e4m3": "fp8", "i8": "int8", "uint8": "int8"}


class Keywords(TypedDict, total=False):
    """The keyword arguments that every optimizer takes; `DecentralizedOptimizer` explains them."""

    topology: Topology | str | None
    algorithm: str
    group: dist.ProcessGroup | None
    mesh: DeviceMesh | None
    inside: Inside
    mix_strength: Strength
    communicate_every: Rhythm
    global_average_every: int | None
    outer: Outer | None
    fused_backward: bool
    bucket_mb: float
    wire_dtype: torch.dtype | str | None
    low_precision: Way | None
    state_dtype: torch.dtype
    max_grad_norm: float | None
    nonfinite: NonFinite
    cpu_compile: bool
    capturable: bool
    measure: bool
    sync_init: bool
    data_parallel_steps: int
    lr_scale: float
    weight: float | torch.Tensor | None
    asynchronous: bool
    max_lag: int | None
    adapt: int | None
    comm_sms: int | None
    links: Links | Network | str | PathLike[str] | None
    model: torch.nn.Module | None


@dataclass(frozen=True)
class Options:
    """The checked `Keywords` of one optimizer.

    And of a copy of one, the clock that it resumes from, and whether ranks of a machine have equal parameters (`equal_inside`).
    """

    topology: Topology | str | None = None
    algorithm: str = "awc"
    group: dist.ProcessGroup | None = None
    mesh: DeviceMesh | None = None
    inside: Inside = "gradients"
    mix_strength: Strength = 1.0
    communicate_every: Rhythm = 1
    global_average_every: int | None = None
    outer: Outer | None = None
    fused_backward: bool = False
    bucket_mb: float = 25
    wire_dtype: torch.dtype | str | None = None
    low_precision: Way | None = None
    state_dtype: torch.dtype = torch.float32
    max_grad_norm: float | None = None
    nonfinite: NonFinite = "contain"
    cpu_compile: bool = False
    capturable: bool = False
    measure: bool = False
    sync_init: bool = True
    data_parallel_steps: int = 0
    lr_scale: float = 1.0
    weight: float | None = None
    asynchronous: bool = False
    max_lag: int | None = None
    adapt: int | None = None
    comm_sms: int | None = None
    links: Links | Network | str | PathLike[str] | None = None
    model: torch.nn.Module | None = None
    clock: Mapping[str, Any] = field(default_factory=dict)
    equal_inside: bool = False

    @staticmethod
    def of(keywords: Keywords) -> Options:
        """Check the value of each keyword by itself; `compatibility` has combinations.

        Raises:
            ValueError, TypeError: one is wrong; says which.
            OSError: the file of `links` cannot be read.
        """
        given: dict[str, Any] = {**keywords, "weight": checked(keywords.get("weight"))}
        options = Options(**given)
        MixStrength.of(options.mix_strength)
        check_rhythm(options.communicate_every)
        every = options.global_average_every
        if every is not None and not (isinstance(every, int) and every >= 1):
            raise ValueError(f"global_average_every must be a whole number of at least 1, got {every!r}")
        if not (math.isfinite(options.bucket_mb) and options.bucket_mb > 0):
            raise ValueError(f"bucket_mb must be positive and finite, got {options.bucket_mb!r}; 25 is a good size")
        if options.low_precision not in (None, *WAYS):
            ways = ", ".join(map(repr, WAYS))
            meant = did_you_mean(options.low_precision, WAYS)
            raise ValueError(f"low_precision is one of {ways}, or None, got {options.low_precision!r}{meant}")
        try:
            wire_format(None if options.wire_dtype == EXACT else options.wire_dtype)
        except ValueError as error:
            raise ValueError(
                f"{error}{did_you_mean(options.wire_dtype, ('bf16', 'fp8', 'int8', EXACT), _WIRES)}"
            ) from None
        if options.state_dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"state_dtype is torch.float32 or torch.bfloat16, got {options.state_dtype!r}")
        sms = options.comm_sms
        if sms is not None and not (isinstance(sms, int) and not isinstance(sms, bool) and 1 <= sms <= 64):
            raise ValueError(f"comm_sms must be a whole number of 1 to 64, or None for NCCL's own choice, got {sms!r}")
        if options.inside not in get_args(Inside):
            raise ValueError(
                f"inside is 'gradients' or 'parameters', what ranks of a machine average, got {options.inside!r}"
                f"{did_you_mean(options.inside, get_args(Inside))}"
            )
        if options.nonfinite not in get_args(NonFinite):
            ways = ", ".join(map(repr, get_args(NonFinite)))
            raise ValueError(
                f"nonfinite is one of {ways}, got {options.nonfinite!r}{did_you_mean(options.nonfinite, get_args(NonFinite))}"
            )
        steps = options.data_parallel_steps
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
            raise ValueError(f"data_parallel_steps must be a whole number of steps, 0 for none, got {steps!r}")
        if not (math.isfinite(options.lr_scale) and options.lr_scale > 0):
            raise ValueError(f"lr_scale must be positive and finite, got {options.lr_scale!r}; 1 changes nothing")
        lag = options.max_lag
        if lag is not None and (not isinstance(lag, int) or isinstance(lag, bool) or lag < 0):
            raise ValueError(f"max_lag must be a whole number of steps, or None for any number, got {lag!r}")
        if lag is not None and not options.asynchronous:
            raise ValueError(
                f"max_lag={lag} bounds asynchronous steps, and these wait for each other: asynchronous=True"
            )
        adapt = options.adapt
        if adapt is not None and (not isinstance(adapt, int) or isinstance(adapt, bool) or adapt < 1):
            raise ValueError(f"adapt must be a whole number of exchanges from one plan to the next, or None, got {adapt!r}")
        clip = options.max_grad_norm
        if clip is not None and not (math.isfinite(clip) and clip > 0):
            raise ValueError(f"max_grad_norm must be positive and finite, or None for no clipping, got {clip!r}")
        return dataclasses.replace(options, links=None if options.links is None else links_of(options.links))

    @property
    def known_links(self) -> Links | None:
        """The links that were given."""
        return None if self.links is None else links_of(self.links)

    @property
    def codes(self) -> torch.dtype | None:
        """dtype of compressed messages, or None; ValueError for formats that do not exist."""
        return wire_format(None if self.wire_dtype == EXACT else self.wire_dtype)

    @property
    def strength(self) -> MixStrength:
        """How strongly steps mix."""
        return MixStrength.of(self.mix_strength)

    @property
    def storage(self) -> Storage:
        """How 16-bit parameters and states are kept."""
        return Storage(self.low_precision, self.state_dtype)

    def portable(self, clock: Mapping[str, Any], *, equal_inside: bool) -> Options:
        """These options as a pickled or copied optimizer carries them: ranks have diverged, so no broadcast from rank 0.

        `equal_inside` says that those of a machine have not.
        """
        if self.group is not None or self.mesh is not None:
            raise TypeError(
                "an optimizer with a group or mesh of its own cannot be pickled or copied; use state_dict()"
            )
        return dataclasses.replace(self, clock=clock, sync_init=False, equal_inside=equal_inside)
