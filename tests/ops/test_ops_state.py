"""Global averages and broadcasts of models and optimizers, between real processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

import fusedfog
from fusedfog.ops import allreduce_parameters, broadcast_optimizer_state, broadcast_parameters


class Everything(nn.Module):
    """Parameters at the root, buffers of several dtypes, a tied weight, channels_last and 0-d tensors."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.scale = nn.Parameter(torch.tensor(float(rank)))
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.norm = nn.BatchNorm2d(4)
        self.narrow = nn.Parameter(torch.full((5,), rank + 0.5, dtype=torch.bfloat16), requires_grad=False)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.register_buffer("mask", torch.tensor([rank % 2 == 0, True]))
        self.register_buffer("phase", torch.full((2,), complex(rank, 1)), persistent=False)
        self.register_buffer("empty", torch.empty(0, 3))
        assert self.norm.running_mean is not None and self.norm.num_batches_tracked is not None
        self.norm.running_mean.fill_(rank)
        self.norm.num_batches_tracked.fill_(rank)


def models() -> None:
    n, me = dist.get_world_size(), dist.get_rank()
    model = Everything(me)
    every = [
        dict(Everything(rank).named_parameters(remove_duplicate=False)) | dict(Everything(rank).named_buffers())
        for rank in range(n)
    ]
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    allreduce_parameters(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() or tensor.is_complex():
            mean = sum(each[name].detach().to(torch.complex128) for each in every) / n
            torch.testing.assert_close(tensor.detach().to(torch.complex128), mean, rtol=4e-3, atol=1e-6)
        else:
            assert torch.equal(tensor, every[me][name]), name
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers

    model = Everything(me)
    broadcast_parameters(model, src=1)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert torch.equal(tensor, every[1][name]), name
    state = Everything(me).state_dict()
    state["note"] = "not a tensor"
    broadcast_parameters(state, src=n - 1)
    assert all(torch.equal(tensor, every[n - 1][name]) for name, tensor in state.items() if name != "note")
    allreduce_parameters(Everything(me).state_dict())
    listed = [torch.tensor(float(me)), torch.tensor([me])]
    allreduce_parameters(listed)
    assert listed[0].item() == (n - 1) / 2 and listed[1].item() == me
    allreduce_parameters([("a", listed[0])])
    broadcast_parameters([])
    # More than one pack, and a tensor larger than one.
    large = [torch.full((size,), float(me)) for size in (3_000_000, 2_000_000, 5_000_000, 1)]
    allreduce_parameters(large)
    assert all(bool((t == (n - 1) / 2).all()) for t in large)


def mistakes() -> list[str]:
    me, texts = dist.get_rank(), []
    calls: list[Any] = [
        lambda: allreduce_parameters([torch.ones(3 if me else 2)]),
        lambda: broadcast_parameters({"a" if me else "b": torch.ones(3)}),
        lambda: broadcast_parameters([torch.ones(3)], src=0 if me else 1),
        lambda: broadcast_parameters([torch.ones(3)], src=9),
        lambda: broadcast_optimizer_state((torch.optim.SGD if me else torch.optim.Adam)([nn.Parameter(torch.ones(1))])),
    ]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        texts.append(str(caught.value))
    for wrong in (torch.ones(3), 3, [3]):
        with pytest.raises(TypeError):
            allreduce_parameters(wrong)  # type: ignore[arg-type]
    return texts


def states() -> None:
    me, n = dist.get_rank(), dist.get_world_size()
    makers: dict[str, Any] = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1 + me, momentum=0.9),
        "Adam": lambda p: torch.optim.Adam(p, lr=0.1 + me, amsgrad=True, betas=(0.5 + me / 10, 0.9)),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1 + me), weight_decay=0.1 * me),
        "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1 + me),
        "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1 + me, max_iter=3 + me),
        "groups": lambda p: torch.optim.RMSprop([{"params": p[:1], "lr": 0.5 + me}, {"params": p[1:]}]),
        "fused": lambda p: fusedfog.AdamW(p, lr=0.1 + me, algorithm="local"),
    }
    for kind, make in makers.items():
        torch.manual_seed(me)
        params = [nn.Parameter(torch.randn(50, 60)), nn.Parameter(torch.randn(3))]

        def loss(params: list[nn.Parameter] = params) -> torch.Tensor:
            for p in params:
                p.grad = None
            total = sum(((p - 1) ** 2).sum() for p in params)
            assert isinstance(total, torch.Tensor)
            total.backward()
            return total

        opt = make(params)
        if me == 1:
            for _ in range(3):
                opt.step(loss)
        before = [p.detach().clone() for p in params]
        broadcast_optimizer_state(opt, src=1)
        assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)), f"{kind} took a step"
        every: list[Any] = [None] * n
        dist.all_gather_object(every, opt.state_dict())
        assert_same(every[me], every[1], kind)
        assert every[me]["state"] or kind == "none"
        # The next step is rank 1's, given rank 1's parameters.
        with torch.no_grad():
            for p in params:
                dist.broadcast(p, 1)
        opt.step(loss)
        dist.all_gather_object(every, [p.detach() for p in params])
        assert_same(every[me], every[1], kind)
    opt = torch.optim.Adam([nn.Parameter(torch.ones(2))], lr=1.0 + me)
    broadcast_optimizer_state(opt)
    assert opt.param_groups[0]["lr"] == 1.0 and not opt.state


def assert_same(one: Any, other: Any, where: str) -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    else:
        assert one == other, where


def everything() -> list[str]:
    models()
    states()
    return mistakes()


def test_models_and_optimizers(ranks: Pool) -> None:
    for texts in ranks.run(3, everything, pg_timeout=15):
        assert "(3,)" in texts[0] and "(2,)" in texts[0]
        assert "missing" in texts[1]
        assert "src" in texts[2] and "src" in texts[3]
        assert "Adam" in texts[4] and "SGD" in texts[4]


def test_alone() -> None:
    """Without a process group everything is its own average."""
    model, opt = nn.BatchNorm1d(3), torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    allreduce_parameters(model)
    broadcast_parameters(model)
    broadcast_optimizer_state(opt)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    with pytest.raises(ValueError, match="no rank 1"):
        broadcast_parameters(model, src=1)
