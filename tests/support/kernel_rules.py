"""Every update rule of `kernels` as the tests of the kernel run it: a new rule is one row here."""

from __future__ import annotations

from dataclasses import dataclass

from fusedfog.kernels import adam_hyper, sgd_hyper


@dataclass(frozen=True)
class Row:
    """One use of a rule.

    Attributes:
        reads: what the rule looks at beside the mixed messages: x, g and its states by number.
        writes: what it changes: x and its states by number.
        states: how many states it has.
        messages: how many messages it makes.
        sent: the messages mixed in: "message", a tensor of its own, or what is named as in `writes`; () is x itself.
        extra: the value of `extra`.
    """

    rule: str
    hyper: tuple[float, ...]
    reads: str
    writes: str
    states: int = 0
    messages: int = 1
    sent: tuple[str, ...] = ()
    extra: float | None = None

    @property
    def grads(self) -> bool:
        return "g" in self.reads


def _sgd(**options: float) -> tuple[float, ...]:
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.0}
    return sgd_hyper({**group, "maximize": False, "nesterov": False, **options})


def _adam(**options: object) -> tuple[float, ...]:
    group = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "decoupled_weight_decay": False}
    return adam_hyper({**group, "maximize": False, **options})


_W = {"weight_decay": 0.1, "decoupled_weight_decay": True}
_ALL = {"weight_decay": 0.1, "maximize": True}
_AFTER = {"sent": ("message",), "messages": 0}
_TRACKING = {"sent": ("x", "0"), "messages": 2}

ROWS: dict[str, Row] = {
    "mix": Row("mix", (), "", "x"),
    "sgd": Row("sgd", _sgd(), "xg", "x"),
    "sgd-decay-maximize": Row("sgd", _sgd(**_ALL), "xg", "x"),
    "sgd-momentum": Row("sgd", _sgd(), "xg0", "x0", 1),
    "sgd-momentum-all": Row("sgd", _sgd(dampening=0.3, **_ALL), "xg0", "x0", 1),
    "sgd-nesterov": Row("sgd", _sgd(nesterov=True, weight_decay=0.1), "xg0", "x0", 1),
    "adam": Row("adam", _adam(), "xg01", "x01", 2),
    "adam-coupled-maximize": Row("adam", _adam(**_ALL), "xg01", "x01", 2),
    "adamw": Row("adam", _adam(**_W), "xg01", "x01", 2),
    "adamw-amsgrad": Row("adam", _adam(**_W), "xg012", "x012", 3),
    "adam-no-memory": Row("adam", _adam(betas=(0.0, 0.0)), "xg01", "x01", 2),
    "accum-adam": Row("accum_adam", (*_adam(**_ALL), 3.0), "xg012", "x012", 3),
    "accum-adamw-1": Row("accum_adam", (*_adam(**_W), 1.0), "xg012", "x012", 3),
    "descend": Row("descend", (0.1, 0.2, -1.0), "xg", ""),
    "decentlam": Row("decentlam", (0.8, 1.0), "x0", "x0", 1, **_AFTER),
    "decentlam-lr-0": Row("decentlam", (0.0, 0.0), "x0", "x0", 1, **_AFTER),
    "quasi-global-before": Row("quasi_global_before", (0.1, 0.9, 0.2, -1.0, 0.0), "xg0", "", 1),
    "quasi-global-before-nesterov": Row("quasi_global_before", (0.1, 0.9, 0.2, -1.0, 1.0), "xg0", "", 1),
    "quasi-global": Row("quasi_global", (0.3, 0.9, 1 - 0.9), "x0", "x0", 1, **_AFTER),
    "quasi-global-lr-0": Row("quasi_global", (0.0, 0.9, 1 - 0.9), "x0", "x0", 1, **_AFTER),
    "exact-diffusion-before": Row("exact_diffusion_before", _sgd(**_ALL), "xg0", "x", 1),
    "exact-diffusion-before-momentum": Row("exact_diffusion_before", _sgd(**_ALL), "xg01", "x1", 2),
    "exact-diffusion": Row("exact_diffusion", (), "x0", "x0", 1, messages=0),
    "extra": Row("extra", _sgd(**_ALL), "xg0", "x0", 1),
    "extra-momentum": Row("extra", _sgd(nesterov=True), "xg01", "x01", 2),
    "tracking": Row("tracking", (0.1, 0.9, 0.2, -1.0), "xg1", "x01", 2, **_TRACKING),
    "adam-tracking": Row("adam_tracking", _adam(**_ALL), "xg123", "x0123", 4, **_TRACKING),
    "adamw-tracking-amsgrad": Row("adam_tracking", _adam(**_W), "xg1234", "x01234", 5, **_TRACKING),
    "dag": Row("dag", _adam(**_W, lr=0.5), "x01", "x01", 2, **_AFTER),
    "dag-amsgrad": Row("dag", _adam(lr=0.5), "x012", "x012", 3, **_AFTER),
    "dag-lr-0": Row("dag", _adam(**_W, lr=0.0), "x01", "x01", 2, **_AFTER),
    "quasi-global-adam-before": Row("quasi_global_adam_before", _adam(**_ALL), "xg012", "01", 3, extra=0.25),
    "quasi-global-adam-before-first": Row("quasi_global_adam_before", _adam(**_W), "xg012", "01", 3, extra=0.0),
    "quasi-global-adam": Row("quasi_global_adam", (1.0,), "x", "x0", 1, **_AFTER),
    "quasi-global-adam-lr-0": Row("quasi_global_adam", (0.0,), "x", "x0", 1, **_AFTER),
    "outer": Row("outer", (0.7, 0.5, 0.0), "01", "x01", 2, messages=0),
    "outer-nesterov": Row("outer", (0.7, 0.9, 1.0), "01", "x01", 2, messages=0),
}

SHAPES = list({(row.rule, row.states): name for name, row in reversed(ROWS.items())}.values())[::-1]
"""The first row of each rule and number of states: what the compiler tells apart."""
