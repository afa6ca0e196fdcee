"""The optimizers a user sees: `torch.optim` faces on the scheduler.

    opt = fusedfog.AdamW(model.parameters(), lr=1e-3, topology="one_peer_exponential")

Each takes the arguments of its torch.optim namesake, with torch's defaults, and the keywords that
`fusedfog.optim.base.DecentralizedOptimizer` explains; what they can do is there too.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from fusedfog.optim.arguments import check_keywords, spelled_out
from fusedfog.optim.base import DecentralizedOptimizer, Params
from fusedfog.optim.options import Keywords, Options
from fusedfog.optim.parameters import check_finite


class _Fused(DecentralizedOptimizer):
    """What the fused optimizers share of torch.optim's arguments: hints, and what their in-place pass cannot do."""

    def _options_of(self, keywords: Keywords) -> Options:
        check_keywords(type(self), keywords)
        return Options.of(keywords)

    def _check_group(self, group: dict[str, Any]) -> None:
        if group["differentiable"]:
            raise ValueError(
                f"differentiable=True: {type(self).__name__} updates parameters in place, outside of autograd, so no gradient "
                f"can flow through its step; leave it out, or use torch.optim.{type(self).__name__.removeprefix('Accum')}"
            )

        if group.get("capturable") and not self._options.capturable:
            raise ValueError(
                f"capturable=True in a param group: a step is recorded as a whole, so give it to {type(self).__name__} itself"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Loaded groups have those of whoever saved them; here the whole optimizer has them, or has not.
        for group in self.param_groups:
            group["differentiable"] = False
            if "capturable" in group:
                group["capturable"] = self._options.capturable


@spelled_out
class SGD(_Fused):
    """`torch.optim.SGD` that averages parameters with neighbours; see `DecentralizedOptimizer` for the other keywords.

    The inner step is torch's: d = g + weight_decay x; buf = momentum buf + (1 - dampening) d (buf = d the first time);
    x -= lr buf, or lr (d + momentum buf) with nesterov. Decay acts on the rank's own unmixed parameters.
    Lian et al. 2017 (D-PSGD, "awc"); adapt-then-combine diffusion ("atc").
    """

    _family = "SGD"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **decentralized: Unpack[Keywords],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults, self._options_of(decentralized))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_finite(group, ("lr", "momentum", "weight_decay"), ("dampening",))
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")


@spelled_out
class Adam(_Fused):
    """`torch.optim.Adam` that averages parameters with neighbours; see `DecentralizedOptimizer` for the other keywords.

    The inner step is torch's, with `weight_decay` added to the gradient of the rank's own unmixed parameters.
    Note that D-Adam's limit differs from the minimiser by O(1) on heterogeneous data, however small lr is.
    """

    _family = "Adam"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **decentralized: Unpack[Keywords],
    ) -> None:
        options = self._options_of(decentralized)
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": options.capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, self._defaults(defaults), options)

    def _defaults(self, defaults: dict[str, Any]) -> dict[str, Any]:
        return defaults

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        check_finite(group, ("lr", "eps", "weight_decay"))
        for beta in group["betas"]:
            if not 0.0 <= beta < 1.0:
                raise ValueError(f"betas must lie in [0, 1), got {group['betas']}")


@spelled_out
class AdamW(Adam):
    """`torch.optim.AdamW` that averages parameters with neighbours: `Adam` with decoupled decay, x *= 1 - lr weight_decay.

    Decay acts on the rank's own unmixed parameters. The other keywords are `DecentralizedOptimizer`'s.
    """

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **decentralized: Unpack[Keywords],
    ) -> None:
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            **decentralized,
        )


@spelled_out
class AccumAdamW(AdamW):
    """AdamW whose moments average `accum_steps` gradients, for small local batches (Wang et al. 2025, Decent-DP).

    With s = accum_steps, k = ceil(t / s) and A the accumulated gradient, every step moves by a provisional

        A += g / s ; x -= lr u((b1 m + (1 - b1) g) / (1 - b1^k), (b2 v + (1 - b2) g^2) / (1 - b2^k))

    and every s-th step commits m = b1 m + (1 - b1) A, v = b2 v + (1 - b2) A^2, A = 0. s = 1 is AdamW. `accum_steps` should
    grow with the number of ranks (the paper uses 4 and 8). Raises ValueError for accum_steps below 1.
    """

    _family = "AccumAdam"

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        accum_steps: int = 1,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **decentralized: Unpack[Keywords],
    ) -> None:
        self._accum_steps = accum_steps
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
            **decentralized,
        )

    def _defaults(self, defaults: dict[str, Any]) -> dict[str, Any]:
        return {**defaults, "accum_steps": self._accum_steps}

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if not (isinstance(group["accum_steps"], int) and group["accum_steps"] >= 1):
            raise ValueError(f"accum_steps must be a whole number of at least 1, got {group['accum_steps']!r}")
