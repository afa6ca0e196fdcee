"""The table of algorithms: what each one sends, its rule before and after the exchange, which mixing matrix it needs.

An algorithm is at most two passes around one exchange. With W the mixing matrix, a the learning rate, g the gradient (with
coupled decay), b the momentum and inner(x) the inner optimizer's step:

    awc                X+ = W X + (inner(X) - X)                       known before forward: one pass
    atc                X+ = W inner(X)
    decentlam          X+ = W (X - a g) - b (a / a_prev) U ; U = X - X+          (Yuan et al. 2021, heavy-ball form)
    quasi_global       momentum from the move of the model, (X - X+) / a         (Lin et al. 2021)
    exact_diffusion    phi = inner(X) - Y ; X+ = Wb phi ; Y+ = Y + phi - X+ ; Wb = (I + W)/2   (Yuan et al. 2018; D2)
    extra              X+ = W X + (inner(X) - X) - Y ; Y+ = Y + (X - W X)/2      (Shi et al. 2015, dual-difference form)
    gradient_tracking  U = b U_prev + g ; Y+ = W Y + U - U_prev ; X+ = W X - a Y+ with b = 0   (DIGing, Nedic et al. 2017)
    momentum_tracking  the same with momentum                                    (Takezawa et al. 2023)
    push_sum           ATC on z = x / w with column-stochastic weights           (SGP, Assran et al. 2019)
    dag                Adam on (X - W (X - a g)) / a   (our reconstruction of Ying et al.'s communicate-then-adapt)
    allreduce          data-parallel training with the mean gradient, the baseline
    local              no communication; with outer=, DiLoCo or NoLoCo

A missing gradient leaves a parameter un-updated (awc, atc, push_sum) or counts as zero (methods whose correction must go
on: extra, exact_diffusion and the tracking ones).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from fusedfog.algorithm import Algorithm, Group, Hyper, Outer, Stage
from fusedfog.errors import did_you_mean
from fusedfog.kernels import adam_hyper, sgd_hyper


def _plain(hyper: Callable[[Group], tuple[float, ...]]) -> Hyper:
    return lambda group, previous_lr: hyper(group)


def _sgd_states(group: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] else ()


def _adam_states(group: Group) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")


def _sign(group: Group) -> float:
    return -1.0 if group["maximize"] else 1.0


def _coupled(group: Group) -> float:
    return 0.0 if group.get("decoupled_weight_decay") else float(group["weight_decay"])


INNER: dict[str, Stage] = {
    "SGD": Stage("sgd", _plain(sgd_hyper), _sgd_states),
    "Adam": Stage("adam", _plain(adam_hyper), _adam_states, scaleless=True),
    "AccumAdam": Stage(
        "accum_adam",
        lambda group, previous_lr: (*adam_hyper(group), float(group["accum_steps"])),
        lambda group: ("exp_avg", "exp_avg_sq", "accumulator"),
        scaleless=True,
    ),
}
"""The inner steps by family: torch.optim's own, and AccumAdam's; Adam and AdamW are one rule with two kinds of decay."""

MIX = Stage("mix")
_DESCEND = Stage("descend", lambda group, previous_lr: (float(group["lr"]), _coupled(group), _sign(group)))

_OWN_MOMENTUM = ("its momentum is a part of the method", "leave it out")
_NO_NESTEROV = {"nesterov": _OWN_MOMENTUM, "dampening": _OWN_MOMENTUM}
_OTHERS = "use quasi_global or gradient_tracking"
_STATIC = {
    "communicate_every": ("it diverges (verified), as it needs the same mixing matrix in every step", _OTHERS),
    "global_average_every": ("it needs the same mixing matrix in every step", _OTHERS),
    "mix_strength that changes": ("it needs the same mixing matrix in every step", f"give a number, or {_OTHERS}"),
}
_NOTHING_TO_MIX = {
    "mesh": ("it exchanges nothing, so machines have nothing to mix", "leave out mesh=, or use awc or atc"),
    "mix_strength": ("it exchanges nothing, so there is nothing to mix", "leave it out, or use awc or atc"),
}
_DATA_PARALLEL = {
    "data_parallel_steps": ("all its steps are data-parallel", "leave it out, or use awc or atc"),
    "lr_scale": ("it never mixes parameters", "give another lr"),
}
_NO_MIXING_YET = {
    "data_parallel_steps": ("it exchanges nothing, so no rank would mix afterwards", "use awc or atc, or outer="),
    "lr_scale": ("it exchanges nothing", "give another lr"),
    "weight": (
        "it exchanges nothing, so each rank minimises its own loss",
        "leave it out, or use awc or atc, or outer=",
    ),
}
_EXACT_SUMS = ("its sums must be conserved exactly", "use atc")


def _common(inner: Stage) -> dict[str, Algorithm]:
    rows = [
        Algorithm("awc", None, inner, asynchronous=True),
        Algorithm("atc", inner, MIX),
        Algorithm(
            "push_sum",
            inner,
            MIX,
            passes_without_exchange=True,
            graph="any",
            weighs=True,
            asynchronous=True,
            conserves=True,
            refuses={
                "global_average_every": ("a full average would need the ranks' push-sum scalars", "use atc"),
                "mesh": ("it works on the ranks' own edges and not on a mesh", "use awc or atc"),
                "mix_strength": ("it uses edges alone, and its rows of W do not sum to one", "use atc"),
                "wire_dtype": _EXACT_SUMS,
                "low_precision": _EXACT_SUMS,
            },
        ),
        Algorithm(
            "allreduce",
            None,
            inner,
            exchanges="gradients",
            refuses=_DATA_PARALLEL
            | {
                "wire_dtype": ("it sends gradients, and what is compressed are parameters", "use awc or atc"),
                "mix_strength": ("it averages gradients, and mixes no parameters", "leave it out, or use awc or atc"),
            },
        ),
        Algorithm(
            "local", None, inner, exchanges="nothing", takes_outer=True, refuses=_NOTHING_TO_MIX | _NO_MIXING_YET
        ),
    ]
    return {row.name: replace(row, plain=True) for row in rows}


def _decentlam_numbers(group: Group, previous_lr: float) -> tuple[float, ...]:
    lr, momentum = float(group["lr"]), float(group["momentum"])
    return (momentum * lr / previous_lr, 1.0) if lr else (0.0, 0.0)


def _sgd_family() -> dict[str, Algorithm]:
    rows = [
        Algorithm(
            "decentlam",
            _DESCEND,
            Stage("decentlam", _decentlam_numbers, lambda group: ("last_move",)),
            messages=("message",),
            passes_without_exchange=True,
            graph="symmetric",
            begins_with={"last_move": ("momentum_buffer", True)},
            refuses=_NO_NESTEROV | _STATIC,
        ),
        Algorithm(
            "quasi_global",
            Stage(
                "quasi_global_before",
                lambda group, previous_lr: (
                    float(group["lr"]),
                    float(group["momentum"]),
                    _coupled(group),
                    _sign(group),
                    float(group["nesterov"]),
                ),
                lambda group: ("momentum_buffer",),
            ),
            Stage(
                "quasi_global",
                lambda group, previous_lr: (
                    float(group["lr"]),
                    float(group["momentum"]),
                    1.0 - float(group["momentum"]),
                ),
                lambda group: ("momentum_buffer",),
            ),
            messages=("message",),
            passes_without_exchange=True,
            refuses={"dampening": _OWN_MOMENTUM},
        ),
        Algorithm(
            "exact_diffusion",
            Stage("exact_diffusion_before", _plain(sgd_hyper), lambda group: ("dual", *_sgd_states(group)), "zero"),
            Stage("exact_diffusion", states=lambda group: ("dual",), differences=True),
            passes_without_exchange=True,
            graph="symmetric",
            lazy=True,
            conserves=True,
            restarts=("dual",),
            refuses=_STATIC,
        ),
        Algorithm(
            "extra",
            None,
            Stage("extra", _plain(sgd_hyper), lambda group: ("dual", *_sgd_states(group)), "zero", differences=True),
            graph="symmetric",
            conserves=True,
            restarts=("dual",),
            refuses=_STATIC,
        ),
        *_tracking_sgd(),
    ]
    return _common(INNER["SGD"]) | {row.name: row for row in rows}


def _tracking_sgd() -> list[Algorithm]:
    tracking = Stage(
        "tracking",
        lambda group, previous_lr: (float(group["lr"]), float(group["momentum"]), _coupled(group), _sign(group)),
        lambda group: ("tracker", "tracked"),
        missing="zero",
    )
    return [
        Algorithm(
            "gradient_tracking",
            None,
            tracking,
            messages=("param", "tracker"),
            conserves=True,
            restarts=("tracker", "tracked"),
            refuses={"momentum": ("it has none", "use algorithm='momentum_tracking'")} | _NO_NESTEROV,
        ),
        Algorithm(
            "momentum_tracking",
            None,
            tracking,
            messages=("param", "tracker"),
            conserves=True,
            restarts=("tracker", "tracked"),
            begins_with={"tracker": ("momentum_buffer", False), "tracked": ("momentum_buffer", False)},
            refuses=_NO_NESTEROV,
        ),
    ]


def _adam_family() -> dict[str, Algorithm]:
    rows = [
        Algorithm(
            "dag",
            _DESCEND,
            Stage("dag", _plain(adam_hyper), _adam_states),
            messages=("message",),
            wants_static=True,
            passes_without_exchange=True,
            waits_at_zero_lr=True,
        ),
        Algorithm(
            "quasi_global",
            Stage(
                "quasi_global_adam_before",
                _plain(adam_hyper),
                lambda group: ("exp_avg", "exp_avg_sq", "last_move"),
                scaleless=True,
            ),
            Stage(
                "quasi_global_adam", lambda group, previous_lr: (float(group["lr"] != 0),), lambda group: ("last_move",)
            ),
            messages=("message",),
            passes_without_exchange=True,
            normalized="last_move",
            waits_at_zero_lr=True,
            refuses={"amsgrad": ("its second moment is not the gradient's", "leave it out")},
        ),
        Algorithm(
            "gradient_tracking",
            None,
            Stage(
                "adam_tracking",
                _plain(adam_hyper),
                lambda group: ("tracker", "tracked", *_adam_states(group)),
                missing="zero",
            ),
            messages=("param", "tracker"),
            conserves=True,
            restarts=("tracker", "tracked"),
        ),
    ]
    return _common(INNER["Adam"]) | {row.name: row for row in rows}


def _accum_family() -> dict[str, Algorithm]:
    no_amsgrad = {"amsgrad": ("its second moment is that of averaged gradients", "leave it out, or use AdamW")}
    rows = _common(INNER["AccumAdam"])
    return {name: replace(row, refuses={**row.refuses, **no_amsgrad}) for name, row in rows.items() if not row.weighs}


TABLE: dict[str, dict[str, Algorithm]] = {"SGD": _sgd_family(), "Adam": _adam_family(), "AccumAdam": _accum_family()}
"""family -> algorithm name -> row."""

WRAPPED = {
    "awc": Algorithm("awc", None, MIX, plain=True, asynchronous=True),
    "atc": Algorithm("atc", Stage("outside"), MIX, plain=True),
    "allreduce": Algorithm("allreduce", None, MIX, exchanges="gradients", plain=True, refuses=_DATA_PARALLEL),
    "local": Algorithm("local", None, MIX, exchanges="nothing", plain=True, refuses=_NOTHING_TO_MIX | _NO_MIXING_YET),
}
"""Around another optimizer's own step (`Scheduler.step_around`), which is a pass of no rule."""


def algorithm_for(name: str, family: str, outer: Outer | None = None) -> Algorithm:
    """The row of algorithm `name` for the inner optimizer `family`: "SGD", "Adam", "AccumAdam", or "wrapped" for any.

    Where `outer` does not run over its steps, which `compatibility` refuses, it is the row without.

    Raises:
        ValueError: there is no such algorithm; lists those there are.
    """
    rows = WRAPPED if family == "wrapped" else TABLE[family]
    if name not in rows and family == "wrapped":
        *most, last = map(repr, rows)
        raise ValueError(
            f"Decentralized runs algorithm {', '.join(most)} or {last}, not {name!r}: other methods change the update itself "
            f"and are built into fusedfog.SGD and fusedfog.AdamW{did_you_mean(name, rows)}"
        )
    if name not in rows:
        raise ValueError(
            f"unknown algorithm {name!r} for {family}; there are {', '.join(rows)}{did_you_mean(name, rows)}"
        )
    row = rows[name]
    if outer is None or not row.takes_outer:
        return row
    numbers = (outer.lr, outer.momentum, float(outer.nesterov))
    stage = Stage("outer", lambda group, previous_lr: numbers, lambda group: ("outer_param", "outer_momentum"))
    return Algorithm(name, INNER[family], stage, takes_outer=True, outer=True)


def asynchronous(row: Algorithm) -> Algorithm:
    """The row as an asynchronous optimizer makes it: one pass, between what has arrived and what is sent."""
    if not row.weighs:
        return row
    after = row.before or row.after
    return replace(row, before=None, after=after, passes_without_exchange=False, weighs=False, deposits=True)


def data_parallel(family: str) -> Algorithm:
    """Data-parallel training with the inner optimizer."""
    return algorithm_for("allreduce", family)


def alone(family: str) -> Algorithm:
    """What every algorithm is on one rank: the inner optimizer's own step."""
    return algorithm_for("local", family)
