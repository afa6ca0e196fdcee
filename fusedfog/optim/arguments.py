"""What a user hands to an optimizer, before anything is made of it: signatures, parameters, keys of param groups."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fusedfog.errors import did_you_mean
from fusedfog.log import warn_user
from fusedfog.optim.options import Keywords, Options

Kind = TypeVar("Kind", bound=type[torch.optim.Optimizer])

ALIASES = {
    "learning_rate": "lr",
    "wd": "weight_decay",
    "decay": "weight_decay",
    "epsilon": "eps",
    "beta": "betas",
    "graph": "topology",
    "process_group": "group",
    "mixed": "mix",
}
"""What other libraries call it: for "did you mean"."""

PASSED_OVER = frozenset(
    {
        # Every param group may have a name, and torch writes these into it.
        "params", "param_names", "name", "group_name", "mix", "fusedfog",
        # Schedules of torch.optim.lr_scheduler and swa_utils keep their own numbers there.
        "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr",
        # Layer-wise decay (timm) and others multiply the schedule by these.
        "lr_scale", "lr_mult", "decay_mult", "wd_mult",
        # The namesakes of torch.optim have them, so that groups go from one optimizer to another.
        "maximize", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay",
    }
)  # fmt: skip
"""Keys of param groups that mean nothing to an optimizer and are no mistake."""


def spelled_out(kind: Kind) -> Kind:
    """Give an optimizer's `__init__` the signature with every keyword of `Keywords`, for `help()` and `inspect`.

    In the code they are `**decentralized: Unpack[Keywords]`, which type checkers and editors expand: one list, not five.
    """
    function: Callable[..., None] = vars(kind)["__init__"]
    own = inspect.signature(function)
    named = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
    keywords = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=getattr(Options, name),
            annotation=getattr(annotation, "__forward_arg__", annotation),
        )
        for name, annotation in Keywords.__annotations__.items()
    ]
    function.__dict__["__signature__"] = own.replace(parameters=[*named, *keywords])
    return kind


def check_keywords(kind: type, keywords: Mapping[str, Any]) -> None:
    """Raise TypeError, as Python does, for keywords that an optimizer does not take; says which one was meant."""
    for name in keywords.keys() - Keywords.__annotations__.keys():
        known = [*inspect.signature(kind).parameters, *Keywords.__annotations__]
        raise TypeError(
            f"{kind.__name__}() got an unexpected keyword argument {name!r}{did_you_mean(name, known, ALIASES)}"
        )


def given_parameters(kind: str, params: Any) -> Any:
    """What torch.optim.Optimizer shall be given: `params`, with generators made lists.

    Raises:
        TypeError: it is, or holds, a module or something else that is commonly passed in place of parameters.
    """
    _check_no_module(kind, params, "")
    if isinstance(params, torch.optim.Optimizer):
        raise TypeError(
            f"{kind} was given a {type(params).__name__} optimizer in place of parameters: pass the parameters, or wrap it, "
            f"fusedfog.Decentralized(optimizer)"
        )
    if isinstance(params, Mapping):
        instead = "a list of param groups, [group]" if "params" in params else "model.parameters()"
        raise TypeError(f"{kind} was given a mapping, {type(params).__name__}, in place of parameters: pass {instead}")
    if isinstance(params, Tensor):
        return params  # torch says what is wrong
    entries = list(params)
    for number, entry in enumerate(entries):
        if isinstance(entry, Mapping):
            check_group_parameters(kind, entry, number)
        else:
            _check_no_module(kind, entry[1] if _is_pair(entry) else entry, f" (entry {number})")
    return entries


def check_group_parameters(kind: str, group: Mapping[str, Any], number: int) -> None:
    """Raise TypeError if a param group's "params" is, or holds, a module."""
    params = group.get("params")
    _check_no_module(kind, params, f" (param group {number})")
    if isinstance(params, list | tuple):
        for entry in params:
            _check_no_module(kind, entry[1] if _is_pair(entry) else entry, f" (param group {number})")


def _is_pair(entry: object) -> bool:
    return isinstance(entry, tuple) and len(entry) == 2


def _check_no_module(kind: str, given: object, where: str) -> None:
    if isinstance(given, nn.Module) and not isinstance(given, nn.ParameterList):
        raise TypeError(
            f"{kind} was given a torch.nn.Module, {type(given).__name__}, in place of parameters{where}: pass "
            f"model.parameters(), or model.named_parameters()"
        )
    if isinstance(given, str):
        raise TypeError(
            f"{kind} was given the str {given[:60]!r} in place of parameters{where}: pass model.parameters()"
        )


def warn_of_unknown_keys(kind: str, group: Mapping[str, Any], number: int, known: Iterable[str]) -> None:
    """Warn of keys of a param group that the optimizer will never read, as torch.optim does not."""
    known = list(known)
    for name in group.keys() - {*known, *PASSED_OVER}:
        if not (isinstance(name, str) and name.startswith("_")):
            warn_user(
                f"{kind}: nothing reads {name!r} of param group {number}{did_you_mean(name, [*known, 'mix'], ALIASES)} "
                f"(a key that begins with '_' is passed over in silence)",
                UserWarning,
            )


def warn_of_misspelt_mix(kind: str, group: Mapping[str, Any], number: int) -> None:
    """The same around another optimizer, which alone knows its own keys: `mix` is the one that it does not read."""
    for name in group:
        if name != "mix" and did_you_mean(name, ["mix"], ALIASES):
            warn_user(f"{kind}: nothing reads {name!r} of param group {number}; did you mean 'mix'?", UserWarning)
