"""A row of the table of algorithms: a `Stage` is a pass, an `Algorithm` those around an exchange; an `Outer` runs over steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from fusedfog.kernels import COMPILED_RULES

Group: TypeAlias = Mapping[str, Any]
Hyper: TypeAlias = Callable[[Group, float], tuple[float, ...]]
"""(param group, the group's last learning rate that was not zero) -> a rule's numbers."""


def _no_numbers(group: Group, previous_lr: float) -> tuple[float, ...]:
    return ()


def _no_states(group: Group) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Stage:
    """One pass over the flat buffers.

    Attributes:
        rule: a rule of `kernels`.
        hyper, states: its numbers and the names of its states for a param group.
        missing: whether a parameter without a gradient is only mixed ("skip") or has a zero gradient ("zero").
        differences: the rule takes the neighbours' weighted differences alone, without the rank's own value.
        scaleless: it makes the same update of a gradient times a number; see `engine.rank_weights`.
    """

    rule: str
    hyper: Hyper = _no_numbers
    states: Callable[[Group], tuple[str, ...]] = _no_states
    missing: Literal["skip", "zero"] = "skip"
    differences: bool = False
    scaleless: bool = False


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    Attributes:
        before: the pass that makes the message from the gradient; None if the messages are known before forward.
        after: the pass that consumes the inbox.
        exchanges: what travels: parameters to and from neighbours, gradients to everyone, or nothing.
        messages: the flat tensors that travel and that neighbours' values are compared with: "param", a state, or
            "message", a buffer that `before` writes while it leaves the parameters alone.
        passes_without_exchange: steps without an exchange have a pass `after` too, which mixes with W = I.
        graph: the topologies the theory covers: any doubly stochastic sequence, a static symmetric matrix, or any graph,
            of which only the edges are used.
        wants_static: its default graph is static, since it does badly on those that change.
        lazy: W is replaced by (I + W)/2.
        normalized: a state whose inverse global norm the `before` pass takes as an extra number.
        waits_at_zero_lr: a step with lr = 0 does not count for bias correction.
        plain: its states are just torch.optim's, kept only for parameters that have had a gradient.
        conserves: sums over ranks must be conserved, so no message may be left out.
        weighs: push-sum's scalars weigh what ranks hold, so row sums are not one.
        asynchronous: `asynchronous=True` may make its steps.
        deposits: it makes them, and sends shares of a mass beside estimates: asynchronous push-sum.
        takes_outer: `outer=` may run over its steps.
        outer: an `Outer` does: the state "outer_param" is where the last exchange left the parameters.
        restarts: states that carry sums over the ranks, and begin with zero when the ranks change.
        begins_with: state -> (the inner optimizer's state that it is after data-parallel steps, whether times lr); others
            begin with zero.
        refuses: option -> (why, what to use instead), for options outside the theory; `compatibility` reads it.
    """

    name: str
    before: Stage | None
    after: Stage
    exchanges: Literal["parameters", "gradients", "nothing"] = "parameters"
    messages: tuple[str, ...] = ("param",)
    passes_without_exchange: bool = False
    graph: Literal["doubly_stochastic", "symmetric", "any"] = "doubly_stochastic"
    wants_static: bool = False
    lazy: bool = False
    normalized: str | None = None
    waits_at_zero_lr: bool = False
    plain: bool = False
    conserves: bool = False
    weighs: bool = False
    asynchronous: bool = False
    deposits: bool = False
    takes_outer: bool = False
    outer: bool = False
    restarts: tuple[str, ...] = ()
    begins_with: Mapping[str, tuple[str, bool]] = field(default_factory=dict)
    refuses: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def state_names(self, group: Group) -> tuple[str, ...]:
        """All states that this algorithm keeps for the parameters of a group."""
        own = self.after.states(group)
        return own if self.before is None else tuple(dict.fromkeys((*self.before.states(group), *own)))

    def passes_after_exchange(self, exchanging: bool) -> bool:
        """Whether a step, with or without exchange, ends with a pass `after` that takes no gradients."""
        return self.before is not None and (exchanging or self.passes_without_exchange)

    def counts_updates(self, group: Group) -> bool:
        """Whether a pass with gradients counts as an update, for bias correction."""
        return bool(self.state_names(group)) and not (self.waits_at_zero_lr and group["lr"] == 0)

    @property
    def capturable(self) -> bool:
        """Whether a step's passes follow each other with no exchange in between, so that they can be recorded as a whole."""
        return self.before is None and self.exchanges != "gradients"

    @property
    def compiled(self) -> bool:
        """Whether `cpu_compile=True` knows its passes."""
        return (self.before or self.after).rule in COMPILED_RULES and not self.weighs


@dataclass(frozen=True)
class Outer:
    """An outer optimizer over local steps: every `every` steps, ranks exchange parameters and move their anchor phi.

        delta = W theta - phi ; m = momentum m + lr delta ; phi += m ; theta = phi              (nesterov=False)
        m = momentum m + delta ; phi += lr (delta + momentum m) ; theta = phi                   (nesterov=True)

    `topology="fully_connected", nesterov=True` is DiLoCo (Douillard et al. 2023, lr 0.7, momentum 0.9);
    `topology=random_matching(n, seed)` with the default is NoLoCo (Kolehmainen et al. 2025, published code). W is
    I + s (W - I) with `mix_strength`.

    Raises:
        ValueError: `every` below 1, or numbers that are negative or not finite.
    """

    every: int = 50
    lr: float = 0.7
    momentum: float = 0.5
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 <= self.momentum < 1 or not 0 < self.lr < float("inf"):
            raise ValueError(f"outer: every must be at least 1, lr positive and momentum in [0, 1), got {self}")
