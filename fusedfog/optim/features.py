"""What one optimizer's setup has: plain facts, and by name the features that `compatibility` asks about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fusedfog.algorithm import Algorithm
from fusedfog.algorithms import TABLE, WRAPPED, alone
from fusedfog.kernels import device
from fusedfog.topology import Topology

_CPU = torch.device("cpu")


_KEYWORDS = ("capturable",)
"""Keywords that param groups of torch.optim have too."""


@dataclass(frozen=True)
class Setup:
    """Plain facts about one optimizer that is to be built, or changed.

    Attributes:
        family: "SGD", "Adam", "AccumAdam", or "wrapped" for `Decentralized`.
        algorithm: the chosen row.
        options: keywords by name.
        groups: the param groups, for their hyper-parameters.
        ranks: how many exchange; 1 also while that is not known yet.
        topology: the chosen one, once it is known.
        sharded: the parameters are FSDP2's.
        data_parallel: they are in a DistributedDataParallel.
        dtypes: those of the parameters, by name.
        place: where the parameters are.
        elastic: the run's members may change.
        lacking: what the GPU has no instructions for: (its dtype and use, why, what to use instead).
    """

    family: str
    algorithm: Algorithm
    options: Mapping[str, Any] = field(default_factory=dict)
    groups: Sequence[Mapping[str, Any]] = ()
    ranks: int = 1
    topology: Topology | None = None
    sharded: bool = False
    data_parallel: bool = False
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict)
    place: torch.device = _CPU
    lacking: tuple[str, str, str] | None = None
    elastic: bool = False

    @property
    def running(self) -> Algorithm:
        """The row whose passes are made: a rank that is alone, and stays so, makes the inner optimizer's own step."""
        return self.algorithm if self.ranks > 1 or self.elastic else alone(self.family)

    @property
    def compresses(self) -> bool:
        """Whether messages are compressed."""
        return self.value("wire_dtype") not in (None, "exact")

    def value(self, name: str) -> Any:
        """A keyword's or hyper-parameter's value; of param groups, the first that has one."""
        given = self.options.get(name)
        if name in _KEYWORDS:
            return given  # Groups of torch.optim's checkpoints may have another optimizer's.
        return given or next((group[name] for group in self.groups if group.get(name)), given)


@dataclass(frozen=True)
class Feature:
    """Something that a setup has or has not.

    Attributes:
        present: whether it has.
        words: what the option table calls it.
        named: what errors call it, with its value; None for `words`.
    """

    present: Callable[[Setup], bool]
    words: str
    named: Callable[[Setup], str] | None = None


def _keyword(name: str, off: Any = None) -> Feature:
    """A keyword or hyper-parameter that is given and is not what it is without."""
    return Feature(
        lambda setup: bool(setup.value(name)) and setup.value(name) != off,
        f"`{name}`",
        lambda setup: f"{name}={setup.value(name)!r}",
    )


def _row(family: str, row: Algorithm) -> Feature:
    # By identity: a row with an Outer over its steps is another one.
    return Feature(
        lambda setup: setup.algorithm is row,
        f"`{row.name}` ({OPTIMIZERS[family]})",
        lambda setup: f"algorithm {row.name!r}",
    )


def _algorithm(present: Callable[[Setup], bool], words: str) -> Feature:
    return Feature(present, words, lambda setup: f"algorithm {setup.algorithm.name!r}")


def _topology(present: Callable[[Topology], bool], words: str) -> Feature:
    return Feature(
        lambda setup: setup.topology is not None and present(setup.topology),
        words,
        lambda setup: f"topology {setup.topology.name if setup.topology is not None else None}",
    )


def _needs(graph: str) -> Callable[[Setup], bool]:
    return lambda setup: setup.algorithm.exchanges == "parameters" and setup.algorithm.graph == graph


def _connected(topology: Topology) -> bool:
    """Whether every rank reaches every other one along a static topology's edges."""
    for ends in ("send", "recv"):
        found, left = {0}, [0]
        while left:
            fresh = set(getattr(topology.round(left.pop()), ends)) - found
            found |= fresh
            left += fresh
        if len(found) < topology.size:
            return False
    return True


def _pauses(setup: Setup) -> bool:
    return setup.options.get("communicate_every", 1) != 1 or bool(setup.value("global_average_every"))


def _changes(setup: Setup) -> bool:
    return callable(setup.options.get("mix_strength"))


def _promises_no_degree(setup: Setup) -> bool:
    if setup.topology is None or setup.topology.period is not None or setup.ranks == 1:
        return False
    try:
        return setup.topology.max_degree < 0
    except ValueError:
        return True


OPTIMIZERS = {"SGD": "SGD", "Adam": "Adam, AdamW", "AccumAdam": "AccumAdamW", "wrapped": "Decentralized"}

ROWS_OF_ALGORITHMS = [
    (f"{family} {row.name}", _row(family, row), row)
    for family, rows in {**TABLE, "wrapped": WRAPPED}.items()
    for row in rows.values()
]
"""(name, feature, row) of every algorithm of every family."""

HYPER = ("momentum", "nesterov", "dampening", "amsgrad")
"""The hyper-parameters that some algorithm refuses."""

FEATURES: dict[str, Feature] = {
    **{name: feature for name, feature, _ in ROWS_OF_ALGORITHMS},
    **{name: _keyword(name) for name in HYPER},
    "communicate_every": Feature(
        lambda setup: setup.options.get("communicate_every", 1) != 1,
        "`communicate_every`",
        lambda setup: (
            "communicate_every="
            + (
                "a function"
                if callable(setup.options["communicate_every"])
                else repr(setup.options["communicate_every"])
            )
        ),
    ),
    "global_average_every": _keyword("global_average_every"),
    "outer": _keyword("outer"),
    "mix_strength": Feature(
        lambda setup: setup.options.get("mix_strength", 1.0) != 1.0,
        "`mix_strength`",
        lambda setup: "mix_strength=" + ("a function" if _changes(setup) else repr(setup.options["mix_strength"])),
    ),
    "mix_strength that changes": Feature(
        lambda setup: _changes(setup), "`mix_strength` as a function", lambda setup: "mix_strength=a function"
    ),
    "fused_backward": _keyword("fused_backward"),
    "wire_dtype": _keyword("wire_dtype", "exact"),
    "low_precision": _keyword("low_precision"),
    "state_dtype": _keyword("state_dtype", torch.float32),
    "max_grad_norm": _keyword("max_grad_norm"),
    "data_parallel_steps": _keyword("data_parallel_steps"),
    "lr_scale": _keyword("lr_scale", 1.0),
    "weight": _keyword("weight"),
    "capturable": _keyword("capturable"),
    "measure": _keyword("measure"),
    "asynchronous": _keyword("asynchronous"),
    "no asynchronous form": _algorithm(
        lambda setup: not setup.algorithm.asynchronous, "an algorithm without an asynchronous form"
    ),
    "asynchronous push_sum": Feature(
        lambda setup: bool(setup.value("asynchronous")) and setup.algorithm.weighs,
        "`asynchronous` push-sum",
        lambda setup: f"asynchronous=True with algorithm {setup.algorithm.name!r}",
    ),
    "changing": _topology(lambda topology: not topology.is_static, "a topology that changes"),
    "not strongly connected": _topology(
        lambda topology: topology.is_static and not _connected(topology), "a topology in which some ranks never reach others"
    ),
    "adapt": _keyword("adapt"),
    "no free order of rounds": _algorithm(
        lambda setup: setup.algorithm.exchanges != "parameters" or setup.algorithm.graph != "doubly_stochastic",
        "an algorithm that does not take any order of doubly stochastic rounds",
    ),
    # Two ranks have one edge, whatever the graph is called.
    "one round": _topology(
        lambda topology: topology.is_static and topology.size > 2, "a static topology of more than two ranks"
    ),
    "heals": Feature(
        lambda setup: setup.value("nonfinite") == "heal", "`nonfinite='heal'`", lambda setup: "nonfinite='heal'"
    ),
    # GPUs ignore it: every pass is compiled there.
    "cpu_compile": replace(
        _keyword("cpu_compile"),
        present=lambda setup: bool(setup.value("cpu_compile")) and not device.on_gpu(setup.place),
    ),
    # Of FSDP2 parameters it only says where shards lie.
    "mesh": Feature(
        lambda setup: setup.value("mesh") is not None and not setup.sharded, "`mesh`", lambda setup: "mesh="
    ),
    "machines that average gradients": Feature(
        lambda setup: (
            setup.value("mesh") is not None
            and not setup.sharded
            and setup.value("inside") != "parameters"
            and setup.algorithm.exchanges == "parameters"
        ),
        "`mesh` with `inside='gradients'`",
        lambda setup: "mesh= with inside='gradients'",
    ),
    "machines that average parameters": Feature(
        lambda setup: setup.value("mesh") is not None and not setup.sharded and setup.value("inside") == "parameters",
        "`mesh` with `inside='parameters'`",
        lambda setup: "mesh= with inside='parameters'",
    ),
    # As torch does it, with a warning: each time that it is listed, it is updated.
    "listed twice": Feature(
        lambda setup: (
            setup.family != "wrapped"
            and any(len(set(g["params"])) < len(g["params"]) for g in setup.groups if "params" in g)
        ),
        "a parameter that is listed twice",
    ),
    "FSDP2": Feature(lambda setup: setup.sharded, "FSDP2 parameters"),
    # Seen by the first step: frameworks wrap the model after the optimizer is built.
    "DistributedDataParallel": Feature(lambda setup: setup.data_parallel, "a module in DistributedDataParallel"),
    "Decentralized": Feature(lambda setup: setup.family == "wrapped", "`Decentralized`", lambda setup: "Decentralized"),
    "elastic": Feature(lambda setup: setup.elastic, "an elastic run", lambda setup: "init(elastic=True)"),
    "mixes nothing": _algorithm(
        lambda setup: setup.algorithm.exchanges != "parameters", "an algorithm that mixes no parameters"
    ),
    "group": Feature(lambda setup: setup.value("group") is not None, "`group`", lambda setup: "group="),
    "unmixed groups": Feature(
        lambda setup: any(not group.get("mix", True) for group in setup.groups), "a param group with `mix=False`"
    ),
    "no learning rate": Feature(
        lambda setup: setup.family == "wrapped" and any("lr" not in group for group in setup.groups),
        "an optimizer whose param groups have no `lr`",
    ),
    "exchanging steps": _algorithm(
        lambda setup: not setup.algorithm.takes_outer, "an algorithm that exchanges in its steps"
    ),
    "exact sums": _algorithm(lambda setup: not setup.running.plain, "an algorithm with states of its own"),
    "exchange in mid-step": Feature(
        lambda setup: not setup.running.capturable,
        "an algorithm that exchanges in the middle of a step",
        lambda setup: f"{'outer= over ' * setup.algorithm.outer}algorithm {setup.algorithm.name!r}",
    ),
    "other passes": _algorithm(lambda setup: not setup.running.compiled, "an algorithm with passes of its own"),
    "needs double stochasticity": _algorithm(
        lambda setup: _needs("doubly_stochastic")(setup) or _needs("symmetric")(setup),
        "an algorithm for doubly stochastic graphs",
    ),
    "needs static symmetry": _algorithm(_needs("symmetric"), "an algorithm for static symmetric graphs"),
    "not doubly stochastic": _topology(
        lambda topology: not topology.is_doubly_stochastic(),
        "a topology that is not doubly stochastic",
    ),
    "not static symmetric": _topology(
        lambda topology: not (topology.is_static and topology.is_symmetric()),
        "a topology that changes, or is not symmetric",
    ),
    "endless": _topology(
        lambda topology: topology.period is None,
        "a topology that never repeats",
    ),
    "endless of any degree": Feature(
        _promises_no_degree,
        "a topology that never repeats and promises no largest degree",
        lambda setup: f"topology {setup.topology.name if setup.topology is not None else None}",
    ),
    "replicas that change": Feature(
        lambda setup: (
            setup.compresses
            and setup.ranks > 1
            and setup.topology is not None
            and not (setup.topology.is_static and not _pauses(setup))
        ),
        "`wire_dtype` on a changing topology, or with steps that do not exchange with neighbours",
        lambda setup: f"wire_dtype={setup.value('wire_dtype')!r}",
    ),
    "no 16-bit parameters": Feature(
        lambda setup: bool(setup.dtypes) and not any(dtype.itemsize == 2 for dtype in setup.dtypes.values()),
        "parameters that are neither bf16 nor fp16",
        lambda setup: f"parameters of {', '.join(sorted({str(dtype) for dtype in setup.dtypes.values()}))}",
    ),
    "float64 parameters": Feature(
        lambda setup: torch.float64 in setup.dtypes.values(),
        "float64 parameters",
        lambda setup: f"float64 parameter {next(n for n, dtype in setup.dtypes.items() if dtype == torch.float64)}",
    ),
    "GPU": Feature(lambda setup: device.on_gpu(setup.place), "a GPU", lambda setup: str(setup.place)),
    "instructions that lack": Feature(
        lambda setup: setup.lacking is not None,
        "parameters, states or messages in a dtype that it has no instructions for",
        lambda setup: setup.lacking[0] if setup.lacking else "",
    ),
}
"""name -> feature. Those that no row names are there to be tested."""
