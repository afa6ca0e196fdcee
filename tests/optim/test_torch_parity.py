"""Alone, each optimizer is its torch.optim namesake, for every combination of options, and speaks its checkpoint format."""

from __future__ import annotations

import copy
import itertools
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import fusedfog

SHAPES = ((7,), (33, 5), (), (1025,), (2, 3, 4, 5), (64,))
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.float64: {"rtol": 1e-12, "atol": 1e-12}}


def sgd_options() -> list[dict[str, Any]]:
    product = itertools.product((0, 0.9), (0, 0.3), (0, 0.1), (False, True), (False, True))
    names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize")
    options = [dict(zip(names, values, strict=True)) for values in product]
    return [o for o in options if not o["nesterov"] or (o["momentum"] and not o["dampening"])]


def adam_options() -> list[dict[str, Any]]:
    product = itertools.product((0, 0.1), (False, True), (False, True), ((0.9, 0.999), (0.0, 0.95)))
    return [dict(zip(("weight_decay", "amsgrad", "maximize", "betas"), values, strict=True)) for values in product]


CASES = [("SGD", o) for o in sgd_options()] + [(kind, o) for kind in ("Adam", "AdamW") for o in adam_options()]


def pair(kind: str, options: dict[str, Any], dtype: torch.dtype, **more: Any) -> tuple[Any, Any, list[Any], list[Any]]:
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    theirs = [nn.Parameter(p.detach().clone()) for p in mine]
    ours = getattr(fusedfog, kind)(mine, lr=0.01, **options, **more)
    reference = getattr(torch.optim, kind)(theirs, lr=0.01, foreach=False, **options)
    return ours, reference, mine, theirs


def feed(params: list[Any], others: list[Any], step: int) -> None:
    """The same gradients to both; every third parameter goes without one now and then."""
    for i, (p, q) in enumerate(zip(params, others, strict=True)):
        absent = i % 3 == 0 and step % 4 == 1
        p.grad = None if absent else torch.randn_like(p)
        q.grad = None if absent else p.grad.clone()


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_200_steps_equal_torch(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    ours, reference, mine, theirs = pair(kind, options, dtype, algorithm="local")
    decay = torch.optim.lr_scheduler.StepLR
    schedules = [decay(ours, 50, 0.5), decay(reference, 50, 0.5)]
    for step in range(200):
        feed(mine, theirs, step)
        ours.step()
        reference.step()
        for schedule in schedules:
            schedule.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, **TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("kind", "options"), [("SGD", {"momentum": 0.9}), ("SGD", {}), ("Adam", {"amsgrad": True}), ("AdamW", {})], ids=str
)
def test_checkpoints_cross_in_both_directions(kind: str, options: dict[str, Any]) -> None:
    ours, reference, mine, theirs = pair(kind, options, torch.float64)
    for step in range(5):
        feed(mine, theirs, step)
        ours.step()
        reference.step()
    mine_saved, theirs_saved = copy.deepcopy(ours.state_dict()), copy.deepcopy(reference.state_dict())
    assert mine_saved["state"].keys() == theirs_saved["state"].keys()
    for i, state in theirs_saved["state"].items():
        assert mine_saved["state"][i].keys() == state.keys()
        for name, value in state.items():
            torch.testing.assert_close(mine_saved["state"][i][name], value, check_dtype=name != "step")
    ours.load_state_dict(theirs_saved)
    reference.load_state_dict(mine_saved)
    for step in range(5, 10):
        feed(mine, theirs, step)
        ours.step()
        reference.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_parameters_that_never_had_a_gradient_have_no_state() -> None:
    used, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = fusedfog.Adam([used, unused])
    assert not opt.state_dict()["state"]
    used.grad = torch.ones(3)
    opt.step()
    assert set(opt.state_dict()["state"]) == {0}
    assert torch.equal(unused, torch.ones(3))


def test_groups_have_their_own_hyper_parameters_and_may_be_added() -> None:
    parts = [[nn.Parameter(torch.full((5,), float(i)))] for i in range(3)]
    twins = [[nn.Parameter(p.detach().clone()) for p in part] for part in parts]
    ours = fusedfog.SGD([{"params": parts[0]}, {"params": parts[1], "lr": 0.5, "momentum": 0.9}], lr=0.1)
    reference = torch.optim.SGD([{"params": twins[0]}, {"params": twins[1], "lr": 0.5, "momentum": 0.9}], lr=0.1)
    for step in range(6):
        if step == 3:
            ours.add_param_group({"params": parts[2], "lr": 0.01})
            reference.add_param_group({"params": twins[2], "lr": 0.01})
        for part, twin in zip(parts, twins, strict=True):
            part[0].grad = torch.full((5,), step + 1.0)
            twin[0].grad = part[0].grad.clone()
        ours.step()
        reference.step()
    for part, twin in zip(parts, twins, strict=True):
        torch.testing.assert_close(part[0], twin[0])


def test_closures_hooks_and_zero_grad_behave_as_in_torch() -> None:
    net = nn.Linear(3, 1)
    opt = fusedfog.SGD(net.parameters(), lr=0.1)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> torch.Tensor:
        calls.append("closure")
        opt.zero_grad()
        loss = net(torch.ones(1, 3)).sum()
        loss.backward()
        return loss

    assert isinstance(opt.step(closure), torch.Tensor)
    assert calls == ["pre", "closure", "post"]
    opt.zero_grad(set_to_none=False)
    assert torch.equal(net.weight.grad, torch.zeros(1, 3))
    opt.zero_grad()
    assert net.weight.grad is None


def test_a_tensor_learning_rate_works() -> None:
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    fusedfog.SGD([p], lr=torch.tensor(0.25)).step()
    assert torch.equal(p, torch.full((3,), 0.75))


def test_momentum_may_be_switched_on_in_mid_run() -> None:
    ours, reference, mine, theirs = pair("SGD", {}, torch.float64)
    for step in range(9):
        if step == 3:
            ours.param_groups[0]["momentum"] = reference.param_groups[0]["momentum"] = 0.9
        feed(mine, theirs, step)
        ours.step()
        reference.step()
    for p, q in zip(mine, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)
    assert "momentum_buffer" in ours.state[mine[1]]


def test_a_pickled_optimizer_goes_on_where_it_was() -> None:
    net = nn.Linear(4, 4)
    opt = fusedfog.AdamW(net.parameters(), lr=0.1)
    data = torch.randn(8, 4)

    def three_steps(model: nn.Module, optimizer: Any) -> torch.Tensor:
        for _ in range(3):
            optimizer.zero_grad()
            model(data).pow(2).sum().backward()
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    three_steps(net, opt)
    twin, copied = pickle.loads(pickle.dumps((net, opt)))
    assert torch.equal(three_steps(net, opt), three_steps(twin, copied))
    assert copied.stats()["steps"] == 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_parameters_have_fp32_arithmetic_and_states(dtype: torch.dtype) -> None:
    p = nn.Parameter(torch.randn(1000).to(dtype))
    q = nn.Parameter(p.detach().float())
    opt, reference = fusedfog.AdamW([p], lr=0.01), torch.optim.AdamW([q], lr=0.01)
    p.grad = torch.randn(1000).to(dtype)
    q.grad = p.grad.float()
    opt.step()
    reference.step()
    assert opt.state[p]["exp_avg"].dtype == torch.float32
    torch.testing.assert_close(opt.state[p]["exp_avg"], reference.state[q]["exp_avg"])
    torch.testing.assert_close(p.detach(), q.detach().to(dtype), rtol=2**-8, atol=0)
    saved = copy.deepcopy(opt.state_dict())
    opt.load_state_dict(saved)
    assert torch.equal(opt.state[p]["exp_avg"], saved["state"][0]["exp_avg"])
