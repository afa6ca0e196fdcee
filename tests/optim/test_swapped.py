"""`swapped()` puts other values in the parameters' place and takes them back, and nobody's training notices."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fusedfog

BUILDERS: dict[str, Any] = {
    "awc": lambda net: fusedfog.AdamW(net.parameters(), lr=0.05),
    "atc": lambda net: fusedfog.AdamW(net.parameters(), lr=0.05, algorithm="atc"),
    "tracking": lambda net: fusedfog.SGD(net.parameters(), lr=0.05, algorithm="gradient_tracking"),
    "push_sum": lambda net: fusedfog.SGD(net.parameters(), lr=0.05, algorithm="push_sum"),
    "allreduce": lambda net: fusedfog.SGD(net.parameters(), lr=0.05, algorithm="allreduce"),
    "fused": lambda net: fusedfog.AdamW(net.parameters(), lr=0.05, fused_backward=True),
    "master": lambda net: fusedfog.AdamW(net.bfloat16().parameters(), lr=0.05, low_precision="master"),
    "kahan": lambda net: fusedfog.AdamW(net.bfloat16().parameters(), lr=0.05, low_precision="kahan"),
    "int8": lambda net: fusedfog.AdamW(net.parameters(), lr=0.05, wire_dtype="int8"),
    "capturable": lambda net: fusedfog.AdamW(net.parameters(), lr=0.05, capturable=True),
    "wrapped": lambda net: fusedfog.Decentralized(torch.optim.RMSprop(net.parameters(), lr=0.01)),
    "unmixed": lambda net: fusedfog.AdamW(
        [{"params": net[0].parameters()}, {"params": net[2].parameters(), "mix": False}], lr=0.05
    ),
    "frozen": lambda net: fusedfog.AdamW([*net[0].parameters(), *net[2].requires_grad_(False).parameters()], lr=0.05),
}


def make(rank: int) -> nn.Sequential:
    torch.manual_seed(rank)
    return nn.Sequential(nn.Linear(5, 40), nn.BatchNorm1d(40), nn.Linear(40, 3))


def train(net: nn.Module, opt: Any, rank: int, steps: range, look: Any = None) -> list[Tensor]:
    for step in steps:
        generator = torch.Generator().manual_seed(10 * step + rank)
        opt.zero_grad()
        x = torch.randn(8, 5, generator=generator).to(next(net.parameters()).dtype)
        net(x).float().square().mean().backward()
        opt.step()
        if look is not None:
            look()
    return [param.detach().clone() for param in net.parameters()]


def with_and_without(name: str) -> tuple[bool, float, list[str]]:
    rank, results, torn = dist.get_rank(), [], 0.0
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for swaps in (False, True):
            net = make(rank)
            opt = BUILDERS[name](net)
            params = [param for group in opt.param_groups for param in group["params"]]

            def look(params: list[Tensor] = params, opt: Any = opt) -> None:
                ema = [torch.full_like(param, 3.0) for param in params]
                before = [param.detach().clone() for param in params]
                with opt.swapped(ema):
                    assert all(bool((param == 3.0).all()) for param in params)
                    with pytest.raises(RuntimeError, match=r"step\(\) inside swapped\(\)"):
                        opt.step()
                with pytest.raises(KeyError), opt.swapped({params[0]: ema[0]}):
                    assert bool((params[0] == 3.0).all()) and torch.equal(params[1], before[1])
                    raise KeyError
                assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))

            results.append(train(net, opt, rank, range(6), look if swaps else None))
            torn += opt.stats()["torn_messages"]
            opt.drain()
    names = [str(one.message) for one in said if issubclass(one.category, fusedfog.TornMessageWarning)]
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True)), torn, names


@pytest.mark.parametrize("name", BUILDERS)
def test_training_with_swaps_between_all_steps_is_training_without(ranks: Pool, name: str) -> None:
    assert ranks.run(2, with_and_without, name) == [(True, 0.0, [])] * 2


def averages_inside_each_other() -> bool:
    rank = dist.get_rank()
    net = make(rank)
    opt = fusedfog.SGD(net.parameters(), lr=0.05, model=net)
    train(net, opt, rank, range(3))
    before = [param.detach().clone() for param in net.parameters()]
    with opt.swapped([torch.full_like(param, float(rank)) for param in before]), opt.averaged():
        assert all(bool((param == 0.5).all()) for param in net.parameters())
    with opt.averaged():
        mean = [param.detach().clone() for param in net.parameters()]
        with opt.swapped(torch.zeros_like(param) for param in before):
            assert not any(param.any() for param in net.parameters())
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), mean, strict=True))
    assert opt.stats()["torn_messages"] == 0
    train(net, opt, rank, range(3, 5))
    changed = {
        name: not torch.equal(param, old) for (name, param), old in zip(net.named_parameters(), before, strict=True)
    }
    del changed["0.bias"]  # The normalisation takes it away: what its gradient has is rounding, on some processors nothing.
    return all(changed.values())


def test_swapped_and_averaged_may_be_inside_each_other(ranks: Pool) -> None:
    assert ranks.run(2, averages_inside_each_other) == [True, True]


@pytest.mark.parametrize("use_buffers", [False, True])
def test_an_averaged_model_is_taken_by_name_whatever_the_order_of_groups(use_buffers: bool) -> None:
    net = make(0)
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim < 2]
    opt = fusedfog.AdamW([{"params": others}, {"params": decayed}], lr=0.05, model=net)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
    train(net, opt, 0, range(4), lambda: ema.update_parameters(net))
    before, own = copy.deepcopy(net.state_dict()), net[1].running_mean.clone()
    net[1].running_mean.add_(1.0)
    with opt.swapped(ema):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), ema.module.parameters(), strict=True))
        assert torch.equal(net[1].running_mean, ema.module[1].running_mean if use_buffers else own + 1.0)
    net[1].running_mean.copy_(own)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_without_names_a_module_is_taken_in_order() -> None:
    net, other = make(0), make(1)
    opt = fusedfog.SGD(net.parameters(), lr=0.1)
    with opt.swapped(other):
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "number": (lambda net: [torch.zeros(40, 5)], ValueError, "1 values for 6 parameters"),
    "shape": (lambda net: [torch.zeros(3)] * 6, ValueError, r"parameter 0.weight has shape \(3,\)"),
    "dtype": (lambda net: [p.double() for p in net.parameters()], ValueError, "torch.float64, the parameter"),
    "stranger": (lambda net: {torch.zeros(3): torch.zeros(3)}, ValueError, r"a tensor of shape \(3,\) is none of"),
    "module": (lambda net: nn.Linear(2, 3), ValueError, "Linear has 2 parameters and this optimizer's model has 6"),
    "tensor": (lambda net: torch.zeros(3), TypeError, "takes tensors in the order"),
    "no tensors": (lambda net: [0.0] * 6, TypeError, "is a float, not a tensor"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_refused_before_anything_changes(what: str) -> None:
    values, error, message = WRONG[what]
    net = make(0)
    opt = fusedfog.SGD(net.parameters(), lr=0.1, model=net)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(error, match=message):
        opt.swapped(values(net))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
