"""The table of algorithms: what each one sends, its rule before and after the exchange, which mixing matrix it needs.

An algorithm is at most two passes around one exchange. With W the mixing matrix and u the inner optimizer's step:

    awc   X+ = W X + (inner(X) - X)      adapt while combining: the message is known before forward, one pass
    atc   X+ = W inner(X)                adapt then combine: one pass before the exchange, one after
    allreduce                            data-parallel training with the mean gradient, the baseline
    local                                no communication
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fusedfog.kernels import adam_hyper, sgd_hyper
from fusedfog.topology import Topology, base_graph, named, one_peer_exponential

Group = Mapping[str, Any]


def _nothing(group: Group) -> tuple[()]:
    return ()


@dataclass(frozen=True)
class Stage:
    """One pass over the flat buffers: a rule of `kernels`, its numbers and its states for a param group."""

    rule: str
    hyper: Callable[[Group], tuple[float, ...]] = _nothing
    states: Callable[[Group], tuple[str, ...]] = _nothing


def _sgd_states(group: Group) -> tuple[str, ...]:
    return ("momentum_buffer",) if group["momentum"] else ()


def _adam_states(group: Group) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if group["amsgrad"] else ("exp_avg", "exp_avg_sq")


INNER: dict[str, Stage] = {
    "SGD": Stage("sgd", sgd_hyper, _sgd_states),
    "Adam": Stage("adam", adam_hyper, _adam_states),
}
"""torch.optim's own steps, by family; Adam and AdamW are one rule with two kinds of decay."""

MIX = Stage("mix")


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    Attributes:
        before: the pass that makes the message from the gradient; None if the message is known before forward.
        after: the pass that consumes the inbox.
        exchanges: what travels: the parameters to and from neighbours, the gradients to everyone, or nothing.
    """

    name: str
    before: Stage | None
    after: Stage
    exchanges: Literal["parameters", "gradients", "nothing"]

    def state_names(self, group: Group) -> tuple[str, ...]:
        """All states that this algorithm keeps for the parameters of a group."""
        stages = (self.before, self.after) if self.before is not None else (self.after,)
        return tuple(name for stage in stages for name in stage.states(group))


ALGORITHMS = ("awc", "atc", "allreduce", "local")


def algorithm_for(name: str, family: str) -> Algorithm:
    """The row of algorithm `name` for the inner optimizer `family` ("SGD", "Adam").

    Raises:
        ValueError: there is no such algorithm; lists those there are.
    """
    inner = INNER[family]
    match name:
        case "awc":
            return Algorithm(name, None, inner, "parameters")
        case "atc":
            return Algorithm(name, inner, MIX, "parameters")
        case "allreduce":
            return Algorithm(name, None, inner, "gradients")
        case "local":
            return Algorithm(name, None, inner, "nothing")
    raise ValueError(f"unknown algorithm {name!r} for {family}; there are {', '.join(ALGORITHMS)}")


def resolve_topology(algorithm: Algorithm, topology: Topology | str | None, size: int) -> Topology | None:
    """The topology an algorithm will use among `size` ranks: the given one, checked, or its default.

    The default is the one-peer exponential graph where `size` is a power of two (one neighbour a step, exact average
    every log2(size) steps), and the Base-2 graph otherwise (exact for any size).

    Raises:
        ValueError: the topology is of another size, unknown, or outside the algorithm's theory; says what to use instead.
        TypeError: not a Topology, a name or None.
    """
    if algorithm.exchanges != "parameters":
        return None
    if topology is None:
        return one_peer_exponential(size) if size & (size - 1) == 0 else base_graph(size)
    if isinstance(topology, str):
        topology = named(topology, size)
    if not isinstance(topology, Topology):
        raise TypeError(f"topology must be a fusedfog.topology.Topology, a name or None, got {type(topology).__name__}")
    if topology.size != size:
        raise ValueError(
            f"topology {topology.name} is for {topology.size} ranks but the group has {size}; "
            f"build it with n={size}, or pass its name to have it sized to the group"
        )
    if not topology.is_doubly_stochastic():
        raise ValueError(
            f"{algorithm.name} needs a doubly stochastic topology: on {topology.name} the ranks would minimise a sum that "
            f"weighs some ranks' losses more than others'. Use 'one_peer_exponential', 'base_graph' or 'ring', or "
            f"fusedfog.topology.from_networkx for Metropolis weights on your own graph"
        )
    return topology
