"""Any torch optimizer, decentralized: it makes its own step, and its parameters are averaged with neighbours around it.

opt = fusedfog.Decentralized(torch.optim.Muon(weights, lr=0.02), topology="one_peer_exponential")
"""

from __future__ import annotations

import inspect
from typing import Any, Unpack

import torch
from torch import Tensor

from fusedfog.engine.scheduler import Scheduler
from fusedfog.engine.wrapped import AroundScheduler
from fusedfog.optim.arguments import check_keywords, spelled_out, warn_of_misspelt_mix
from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.optim.calls import announced
from fusedfog.optim.options import Keywords, Options
from fusedfog.optim.state_dict import carry_clock, loaded_clock, make_room_for_clock, saved_clock
from fusedfog.optim.states import States

_HOOKS = ("state_dict_pre", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")


@spelled_out
class Decentralized(DecentralizedOptimizer):
    """Any `torch.optim.Optimizer`, its parameters averaged with neighbours at every step.

        awc   X+ = inner(X) + (W X - X)     the messages travel under forward and backward
        atc   X+ = W inner(X)               the messages travel after the inner step

    inner(X) is what the wrapped optimizer's `step()` makes of the rank's own unmixed parameters, so everything it does,
    weight decay included, refers to those. Parameters without a gradient are mixed all the same. The wrapper shares
    `param_groups` and `state` with the wrapped optimizer, which must not be stepped, or given param groups, itself;
    learning-rate schedules may be built on either. Where `SGD`, `Adam` or `AdamW` of fusedfog do, they are faster: they
    update and mix in one pass.

    Under a `torch.amp.GradScaler` (used with the wrapper, not the wrapped optimizer), and with `max_grad_norm`, `p.grad` is
    multiplied in place before the inner step, as by `scaler.unscale_` and `clip_grad_norm_`; a non-finite gradient skips
    this rank's inner step, never its exchange. An inner optimizer that can skip on the device (torch's with `fused=True`) is
    given the flag; for others the host reads it, once a step, as GradScaler itself does.

    Args:
        optimizer: the wrapped one, `opt.inner`; it must have been built on the very parameters that are trained.
        decentralized: the keywords of `DecentralizedOptimizer`; `algorithm` is "awc", "atc", "allreduce" or "local".

    Raises:
        TypeError: `optimizer` is not a torch optimizer.
        ValueError: it needs a closure that it evaluates at several points (LBFGS) or is decentralized already;
            an algorithm or keyword that needs fusedfog's own update; see also `DecentralizedOptimizer`.
    """

    _family = "wrapped"
    _states = States()  # None of its own.
    _shares = False
    """torch.optim.Optimizer.__init__, which makes empty states, is over."""

    def __init__(self, optimizer: torch.optim.Optimizer, **decentralized: Unpack[Keywords]) -> None:
        _check_inner(optimizer)
        _check_keywords(optimizer, decentralized)
        self.inner = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults, Options.of(decentralized))

    @property
    def _kind(self) -> str:
        return f"Decentralized({type(self.inner).__name__})"

    def _build(self) -> Scheduler:
        self._share()
        return super()._build()

    @property
    def state(self) -> Any:
        """The wrapped optimizer's."""
        return self.inner.state

    @state.setter
    def state(self, given: Any) -> None:
        if self._shares:
            self.inner.state = given

    def _take_edits(self) -> None:
        """The wrapped optimizer reads its states itself."""

    def _share(self) -> None:
        """Hold the very groups and checkpoint hooks of the wrapped optimizer."""
        self._shares = True
        self.param_groups = self.inner.param_groups
        for name in _HOOKS:
            setattr(self, f"_optimizer_{name}_hooks", getattr(self.inner, f"_optimizer_{name}_hooks"))

    def _check_group(self, group: dict[str, Any]) -> None:
        """The wrapped optimizer has checked its hyper-parameters itself."""

    def _update(self, engine: Scheduler, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if self.param_groups is not self.inner.param_groups:
            # Somebody called inner.load_state_dict(), which makes a new list.
            self._share()
            engine.groups = self.param_groups
        assert isinstance(engine, AroundScheduler)
        engine.step_around(self.inner, grad_scale, found_inf)

    def _warn_of_unknown_keys(self, group: dict[str, Any], number: int) -> None:
        warn_of_misspelt_mix(self._kind, group, number)

    def _has_states(self) -> bool:
        return bool(self.inner.state)

    def _make_states(self, engine: Scheduler) -> None:
        # lr is 0 and gradients are zero, so the wrapped optimizer only makes its states.
        edits = engine.buckets.count_edits()
        self.inner.step()
        engine.buckets.forget_edits(edits)

    def _append_group(self, param_group: dict[str, Any]) -> None:
        if self.param_groups is not self.inner.param_groups:
            super()._append_group(param_group)  # torch.optim.Optimizer.__init__ is looking at the groups
            return
        self.inner.add_param_group(param_group)
        self.param_groups[-1].setdefault("mix", True)

    @announced("state_dict()")
    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's `state_dict()`, which it can load, plus `"fusedfog"`: the clock. Local; waits for messages."""
        self._engine.drain(keep_failures=True)
        saved = {**self.inner.state_dict(), "fusedfog": saved_clock(self._engine, self._options.algorithm)}
        carry_clock(saved)
        return saved

    @announced("load_state_dict()")
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a `state_dict()`, or one of the wrapped optimizer. Collective, discards messages in flight.

        Raises:
            ValueError: groups differ from this optimizer's, or it was saved by another algorithm.
        """
        engine = self._engine
        engine.meet("load_state_dict()")
        clock, _ = loaded_clock(self._kind, engine, self._options.algorithm, state_dict)
        mixed = [group["mix"] for group in self.param_groups]
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "fusedfog"})
        self._share()
        make_room_for_clock(self.param_groups)
        for group, mix in zip(self.param_groups, mixed, strict=True):
            group["mix"] = mix
        engine.groups = self.param_groups
        engine.discard()
        engine.set_clock(clock)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({name: value for name, value in state.items() if name != "state"})

    def _show_states(self) -> None:
        """The states are the wrapped optimizer's, and are where it put them."""

    def _adopt_states(self, saved: dict[Any, Any], own: bool = True) -> None:
        """See `_show_states`."""


def _check_keywords(inner: torch.optim.Optimizer, keywords: Keywords) -> None:
    for name in keywords.keys() - Keywords.__annotations__.keys():
        if name in inner.defaults:
            raise TypeError(f"Decentralized() takes no {name!r}: give it to the {type(inner).__name__} that it wraps")
    check_keywords(Decentralized, keywords)


def _check_inner(inner: object) -> None:
    if isinstance(inner, torch.nn.Module):
        raise TypeError(
            f"Decentralized was given a torch.nn.Module, {type(inner).__name__}, in place of an optimizer: pass one that was "
            f"built on model.parameters(), Decentralized(torch.optim.RMSprop(model.parameters()), topology=...)"
        )
    if not isinstance(inner, torch.optim.Optimizer):
        raise TypeError(
            f"Decentralized wraps a torch.optim.Optimizer, got {type(inner).__name__}; build that first: "
            f"Decentralized(torch.optim.RMSprop(model.parameters()), topology=...)"
        )
    if isinstance(inner, DecentralizedOptimizer):
        raise ValueError(f"this fusedfog.{type(inner).__name__} is decentralized already; use it as it is")
    _, *arguments = inspect.signature(type(inner).step).parameters.values()
    if any(one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in arguments):
        raise ValueError(
            f"{type(inner).__name__}.step() needs a closure, which it evaluates at points of its own choosing; averaging with "
            f"neighbours would move those under it. Wrap an optimizer that steps from the gradients that backward left"
        )
