"""A parameter has one optimizer at a time, and what an optimizer refuses it leaves as it was."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.pool import Pool
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fusedfog


def params(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(3.0) + i) for i in range(count)]


def train(opt: Any, trained: list[nn.Parameter], fused: bool = False) -> None:
    if fused:
        sum(p.square().sum() for p in trained).backward()  # type: ignore[union-attr]
    else:
        for p in trained:
            p.grad = torch.ones_like(p)
    opt.step()


def test_a_second_optimizer_is_refused_with_the_name_of_the_first_and_where_it_was_built() -> None:
    model = nn.Linear(3, 2)
    first = fusedfog.AdamW(model.parameters(), model=model)
    home = model.weight.data_ptr()
    with pytest.raises(
        ValueError, match=r"parameter weight is trained by another .*AdamW \(built at .*test_ownership.py:\d+"
    ):
        fusedfog.SGD(model.parameters(), lr=0.1, model=model)
    assert model.weight.data_ptr() == home
    train(first, list(model.parameters()))


def test_disjoint_parts_of_a_model_have_optimizers_of_their_own() -> None:
    one, two = params()
    opts = [fusedfog.SGD([p], lr=0.5) for p in (one, two)]
    for opt, p in zip(opts, (one, two), strict=True):
        train(opt, [p])
    assert one.tolist() == [-0.5, 0.5, 1.5]


@pytest.mark.parametrize("fused", [False, True], ids=["step", "fused_backward"])
def test_after_release_another_optimizer_takes_over_and_the_first_never_acts_again(fused: bool) -> None:
    trained = params()
    first = fusedfog.SGD(trained, lr=0.25, fused_backward=fused)
    train(first, trained, fused)
    values = [p.detach().clone() for p in trained]
    first.release()
    assert all(torch.equal(p, value) for p, value in zip(trained, values, strict=True))
    assert trained[0].untyped_storage().nbytes() == 12
    with pytest.raises(RuntimeError, match="this SGD was released and trains no parameters any more"):
        first.step()
    second = fusedfog.SGD(trained, lr=0.125)
    second.zero_grad()
    sum(p.square().sum() for p in trained).backward()  # type: ignore[union-attr]
    assert all(torch.equal(p, value) for p, value in zip(trained, values, strict=True))
    second.step()
    assert all(torch.equal(p, value * 0.75) for p, value in zip(trained, values, strict=True))
    assert first.state_dict()["param_groups"][0]["lr"] == 0.25
    for call in (first.drain, first.consensus_distance, lambda: first.set_topology(None)):
        with pytest.raises(RuntimeError, match="was released"):
            call()
    first.release()


def test_a_cell_of_a_notebook_that_is_run_again_says_what_to_do_first() -> None:
    cell = "opt = fusedfog.AdamW(trained, lr=0.1)"
    names: dict[str, Any] = {"fusedfog": fusedfog, "trained": params()}
    exec(cell, names)
    with pytest.raises(ValueError, match=r"trained by another optimizer already, AdamW .*Call its release\(\) first"):
        exec(cell, names)
    train(names["opt"], names["trained"])  # what is refused changes nothing
    exec("opt.release()\n" + cell, names)
    train(names["opt"], names["trained"])


def test_an_optimizer_that_is_gone_or_failed_does_not_count() -> None:
    trained = params()
    circle: list[Any] = [fusedfog.SGD(trained, lr=0.1)]
    circle.append(circle)
    del circle
    with pytest.raises(ValueError):
        fusedfog.SGD(trained, lr=0.1, topology="rind")
    second = fusedfog.SGD(trained, lr=0.1)
    del second
    gc.collect()
    fusedfog.AdamW(trained).step()


def test_a_copy_of_the_optimizer_alone_is_refused_as_well() -> None:
    trained = params()
    first = fusedfog.SGD(trained, lr=0.1)
    other = copy.copy(first)
    with pytest.raises(ValueError, match="is trained by another optimizer already"):
        other.step()
    train(first, trained)


def test_of_a_group_that_is_added_parameters_may_not_be_anothers() -> None:
    one, two = params()
    first, second = fusedfog.SGD([one], lr=0.5), fusedfog.SGD([two], lr=0.5)
    group = {"params": [two], "lr": 0.25}
    with pytest.raises(ValueError, match="trained by another optimizer already, SGD"):
        first.add_param_group(group)
    assert group == {"params": [two], "lr": 0.25} and len(first.param_groups) == 1
    train(second, [two])
    second.release()
    first.add_param_group(group)
    train(first, [one, two])


def fail(*_: object) -> None:
    raise OSError("no network")


def test_a_construction_that_fails_late_gives_the_parameters_back(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = params()
    monkeypatch.setattr("fusedfog.optim.build.broadcast", fail)
    with pytest.raises(OSError, match="no network"):
        fusedfog.SGD(trained, lr=0.1)
    assert trained[0].untyped_storage().nbytes() == 12 and trained[0].tolist() == [0.0, 1.0, 2.0]
    monkeypatch.undo()
    train(fusedfog.SGD(trained, lr=0.1), trained)


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"topology": "rind"}, {"max_grad_norm": -1}, {"low_precision": "kahan"}]
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_refused_constructor_leaves_groups_and_parameters_as_they_were(wrong: dict[str, Any], wrapped: bool) -> None:
    trained = params()
    group: dict[str, Any] = {"params": list(trained), "lr": 0.5}
    home = [p.data_ptr() for p in trained]
    if wrapped:
        inner = torch.optim.SGD([group])
        before = dict(group)
        with pytest.raises((ValueError, TypeError)):
            fusedfog.Decentralized(inner, **({"topology": "rind"} if "lr" in wrong else wrong))
    else:
        before = dict(group)
        with pytest.raises(ValueError):
            fusedfog.SGD([group | {"lr": -1.0}] if "lr" in wrong else [group], **({"lr": 0.1} | wrong))
    assert group == before and [p.data_ptr() for p in trained] == home


def test_groups_of_an_iterator_that_was_read_can_be_used_again() -> None:
    group: dict[str, Any] = {"params": iter(params())}
    with pytest.raises(ValueError, match="rind"):
        fusedfog.SGD([group], lr=0.1, topology="rind")
    assert group.keys() == {"params"}
    assert len(fusedfog.SGD([group], lr=0.1).param_groups[0]["params"]) == 2


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize(("kind", "options"), [("SGD", {}), ("AdamW", {}), ("Adam", {"amsgrad": True})])
@pytest.mark.parametrize("order", [[0, 0], [0, 1, 0], [1, 1, 1, 0]])
def test_a_parameter_that_is_listed_twice_is_updated_twice_as_by_torch(
    kind: str, options: dict[str, Any], order: list[int]
) -> None:
    ours, theirs = params(), params()
    with pytest.warns(UserWarning, match="duplicate parameters"):
        opt = getattr(fusedfog, kind)([ours[i] for i in order], lr=0.1, **options)
    twin = getattr(torch.optim, kind)([theirs[i] for i in order], lr=0.1, **options)
    for _ in range(4):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(3)
            other.grad = one.grad.clone()
        opt.step()
        twin.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
    opt.load_state_dict(opt.state_dict())


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_where_a_second_update_is_not_possible_a_parameter_may_be_listed_once() -> None:
    with pytest.raises(ValueError, match=r"a parameter that is listed twice does not work with momentum=0\.9"):
        fusedfog.SGD([*params(), *params()[:1]] * 2, lr=0.1, momentum=0.9)
    one = params()
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        fusedfog.SGD([{"params": one}, {"params": one}], lr=0.1)


class Plain(nn.Parameter):
    """A subclass with nothing of its own."""


class Function(Tensor):
    """A subclass that sees functions."""


class Dispatch(Tensor):
    """A subclass that sees operators, with ordinary memory."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def bare(value: Any) -> Any:
            return value.as_subclass(Tensor) if isinstance(value, Dispatch) else value

        with torch._C._DisableTorchDispatch():
            return func(*map(bare, args), **(kwargs or {}))


SUBCLASSES: dict[str, Callable[[Tensor], Any]] = {
    "parameter": Plain,
    "functions": lambda value: nn.Parameter(value.as_subclass(Function)),
    "dispatch": lambda value: Tensor._make_subclass(Dispatch, value, True),
}


@pytest.mark.parametrize("name", SUBCLASSES)
def test_a_subclass_with_ordinary_memory_trains_as_with_torch(name: str) -> None:
    ours, theirs = SUBCLASSES[name](torch.ones(3)), nn.Parameter(torch.ones(3))
    kind = type(ours)
    opt, twin = fusedfog.AdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for step in range(3):
        ours.grad, theirs.grad = torch.arange(3.0) - step, torch.arange(3.0) - step
        opt.step()
        twin.step()
    assert type(ours) is kind
    torch.testing.assert_close(ours.detach().as_subclass(Tensor), theirs.detach())


def test_a_parameter_made_of_other_tensors_is_refused_by_name() -> None:
    pair = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    group = {"params": [("pair", pair)]}
    with pytest.raises(
        ValueError, match=r"parameter pair is a TwoTensor, whose values lie in other tensors.* torch.optim"
    ):
        fusedfog.SGD([group], lr=0.1)
    with pytest.raises(ValueError, match="parameter 1 is a TwoTensor"):
        fusedfog.SGD([*params(1), pair], lr=0.1)


def left_and_built_again() -> list[float]:
    trained = params()
    first = fusedfog.SGD(trained, lr=0.0)
    train(first, trained)
    first.leave()
    second = fusedfog.SGD(trained, lr=0.5, algorithm="local")
    train(second, trained)
    return trained[0].tolist()


def test_an_optimizer_that_can_make_no_step_any_more_does_not_count(ranks: Pool) -> None:
    assert ranks.run(2, left_and_built_again) == [[-0.5, 0.5, 1.5]] * 2
