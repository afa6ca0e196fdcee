"""`opt.state` is the user's: what is cleared, removed or replaced acts as with torch's optimizer, step for step."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fusedfog

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGD", {}),
    "momentum": ("SGD", {"momentum": 0.9, "dampening": 0.1}),
    "nesterov": ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    "Adam": ("Adam", {"weight_decay": 0.1}),
    "AdamW": ("AdamW", {}),
    "amsgrad": ("AdamW", {"amsgrad": True}),
    "AccumAdamW": ("AccumAdamW", {"accum_steps": 1}),
}


def first(params: list[Tensor], opt: Any) -> dict[str, Any]:
    return opt.state[params[0]]  # type: ignore[no-any-return]


def names(params: list[Tensor], opt: Any) -> list[str]:
    return [
        name for name in first(params, opt) if name in ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    ]


def replace_all(params: list[Tensor], opt: Any) -> None:
    opt.state = defaultdict(dict)


def set_each(make: Callable[[Tensor], Tensor]) -> Callable[[list[Tensor], Any], None]:
    def edit(params: list[Tensor], opt: Any) -> None:
        for name in names(params, opt):
            opt.state[params[0]][name] = make(opt.state[params[0]][name])

    return edit


def new_dict(params: list[Tensor], opt: Any) -> None:
    if names(params, opt):
        opt.state[params[0]] = {name: value * 2 if value.ndim else value for name, value in first(params, opt).items()}


def delete(params: list[Tensor], opt: Any) -> None:
    for param in params[:1]:
        if param in opt.state:
            del opt.state[param]


def step_to(params: list[Tensor], opt: Any) -> None:
    if "step" in first(params, opt):
        number = 5.0 if isinstance(opt, fusedfog.Adam) else torch.tensor(5.0)
        opt.state[params[0]]["step"] = number


def step_in_place(params: list[Tensor], opt: Any) -> None:
    if "step" in first(params, opt):
        opt.state[params[0]]["step"] += 7


def held(params: list[Tensor], opt: Any) -> None:
    """Through dicts and tensors that were taken out before."""
    state = opt.state
    inner = state[params[0]]
    for name in names(params, opt):
        inner[name].mul_(0.5)
    state.update({params[0]: dict(inner)})


def moved(params: list[Tensor], opt: Any) -> None:
    for state in opt.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.share_memory_()
                value.mul_(2)


def to_none(params: list[Tensor], opt: Any) -> None:
    if "momentum_buffer" in first(params, opt):
        opt.state[params[0]]["momentum_buffer"] = None


EDITS: dict[str, Callable[[list[Tensor], Any], object]] = {
    "another state": replace_all,
    "clear": lambda params, opt: opt.state.clear(),
    "pop": lambda params, opt: opt.state.pop(params[0], None),
    "del": delete,
    "clear one": lambda params, opt: first(params, opt).clear(),
    "an empty dict": lambda params, opt: opt.state.update({params[0]: {}}),
    "a tensor": set_each(lambda value: torch.rand_like(value)),
    "a tensor of float64": set_each(lambda value: torch.rand_like(value).double()),
    "a dict": new_dict,
    "a step": step_to,
    "a step in place": step_in_place,
    "held": held,
    "moved": moved,
    "None": to_none,
}


def run(
    kind: Any, options: dict[str, Any], edit: Callable[[list[Tensor], Any], object], after: str = ""
) -> list[Tensor]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(2))]
    opt = kind(params, lr=0.1, **options)
    found = []
    for step in range(6):
        torch.manual_seed(step)
        for param in params[:2] if step % 2 else params:
            param.grad = torch.randn_like(param)
        if step in (0, 2, 4):
            torch.manual_seed(step)
            edit(params, opt)
            if after == "resumed":
                saved = copy.deepcopy(opt.state_dict())
                opt = kind(params, lr=0.1, **options) if kind.__module__.startswith("torch") else opt
                opt.load_state_dict(saved)
            elif after == "copied":
                params, opt = copy.deepcopy((params, opt))
            elif after == "pickled":
                params, opt = pickle.loads(pickle.dumps((params, opt)))
        opt.step()
        opt.zero_grad()
        found.append(torch.cat([p.detach().flatten() for p in params]))
    return found


def kinds(family: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    name, options = FAMILIES[family]
    theirs = {key: value for key, value in options.items() if key != "accum_steps"}
    return getattr(fusedfog, name), getattr(torch.optim, name.removeprefix("Accum")), options, theirs


def check(family: str, edit: str, after: str) -> None:
    ours, theirs, options, their_options = kinds(family)
    if edit == "a tensor of float64":
        # Where torch goes on in float64 we go on in float32.
        found, expected = run(ours, options, EDITS[edit], after), run(theirs, their_options, EDITS["a tensor"], after)
        found, expected = found[:2], expected[:2]
    else:
        found, expected = run(ours, options, EDITS[edit], after), run(theirs, their_options, EDITS[edit], after)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_the_states_acts_as_with_torch(family: str, edit: str) -> None:
    check(family, edit, "")


@pytest.mark.parametrize("after", ["resumed", "copied", "pickled"])
@pytest.mark.parametrize("edit", ["another state", "pop", "a tensor", "a dict", "a step", "clear one"])
@pytest.mark.parametrize("family", ["momentum", "amsgrad"])
def test_an_edit_survives(family: str, edit: str, after: str) -> None:
    check(family, edit, after)


@pytest.mark.parametrize("edit", ["another state", "clear", "a tensor", "a step"])
def test_around_another_optimizer_states_are_that_ones(edit: str) -> None:
    def wrapped(params: list[Tensor], lr: float) -> Any:
        return fusedfog.Decentralized(torch.optim.AdamW(params, lr=lr))

    for one, other in zip(run(wrapped, {}, EDITS[edit]), run(torch.optim.AdamW, {}, EDITS[edit]), strict=True):
        torch.testing.assert_close(one, other)
