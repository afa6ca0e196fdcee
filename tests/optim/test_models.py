"""Models and loops that people have: real ranks equal copies of the model trained in one process and mixed by hand.

The expectation knows nothing of buffers, hooks or messages: for every rank an own copy of the model, autograd, torch's
optimizer, and x_i + sum_j W[i, j] (x_j - x_i) + (inner(x_i) - x_i) for each parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fusedfog

STEPS, RANKS = 5, 2
W = [[0.5, 0.5], [0.5, 0.5]]
"""The ring and the one-peer exponential graph of two ranks."""


class Net(nn.Module):
    """Parameters registered in one order, used in another, `run` saying how."""

    def __init__(self, run: Callable[[Net, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def used_out_of_order_and_twice() -> nn.Module:
    net = Net(
        lambda n, x: n.head(n.b(torch.tanh(n.a(torch.tanh(n.b(n.a(x))))))), head=nn.Linear(6, 3), a=nn.Linear(6, 6)
    )
    net.b = nn.Linear(6, 6)
    return net


def tied() -> nn.Module:
    net = Net(
        lambda n, x: n.b(torch.tanh(n.a(x))) @ torch.ones(6, 3, dtype=x.dtype), a=nn.Linear(6, 6), b=nn.Linear(6, 6)
    )
    net.b.weight = net.a.weight
    return net


def frozen() -> nn.Module:
    net = plain()
    net[0].weight.requires_grad_(False)
    return net


def unused() -> nn.Module:
    return Net(lambda n, x: n.b(x), a=nn.Linear(6, 4), b=nn.Linear(6, 3))


def branch_of_one_rank() -> nn.Module:
    net = Net(lambda n, x: n.b(n.a(x)) if n.deep else n.b(x), a=nn.Linear(6, 6), b=nn.Linear(6, 3))
    net.deep = False
    return net


def checkpointed(reentrant: bool) -> nn.Module:
    def run(net: Net, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda h: torch.tanh(net.b(torch.tanh(net.a(h)))), net.first(x), use_reentrant=reentrant)
        return net.head(hidden)

    return Net(run, first=nn.Linear(6, 5), a=nn.Linear(5, 5), b=nn.Linear(5, 5), head=nn.Linear(5, 3))


def attention() -> nn.Module:
    net = Net(lambda n, x: n.head(n.mha(*(x.view(2, 4, 6),) * 3)[0].reshape(8, 6)), head=nn.Linear(6, 3))
    net.mha = nn.MultiheadAttention(6, 2, batch_first=True)
    return net


def batch_norm() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def channels_last() -> nn.Module:
    conv = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1))
    net = Net(lambda n, x: n.conv(x[:, :2].view(8, 2, 1, 1).expand(8, 2, 3, 3)).mean((2, 3)), conv=conv)
    return net.to(memory_format=torch.channels_last)


def compiled() -> nn.Module:
    return torch.compile(plain(), backend="aot_eager")


def compiled_in_regions() -> nn.Module:
    net = plain()
    for layer in (net[0], net[2]):
        layer.compile(backend="aot_eager")
    return net


def lazy() -> nn.Module:
    net = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(3))
    net(torch.zeros(1, 6))
    return net


def from_meta() -> nn.Module:
    with torch.device("meta"):
        net = plain()
    net.to_empty(device="cpu")
    for layer in (net[0], net[2]):
        layer.reset_parameters()
    return net


MODELS: dict[str, Callable[[], nn.Module]] = {
    build.__name__: build
    for build in (
        plain, used_out_of_order_and_twice, tied, frozen, unused, branch_of_one_rank, attention, batch_norm,
        channels_last, compiled, compiled_in_regions, lazy, from_meta,
    )
} | {"checkpointed": lambda: checkpointed(False), "checkpointed, reentrant": lambda: checkpointed(True)}  # fmt: skip


def build(name: str) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]().double()


def backward(model: nn.Module, rank: int, step: int) -> None:
    """One backward pass of a rank; seeded, so that dropout and data are the rank's own and the same here and there."""
    torch.manual_seed(100 * step + rank)
    if hasattr(model, "deep"):
        model.deep = rank == 1 and step % 2 == 1
    # Reentrant checkpoints pass gradients on only to inputs that want them.
    x = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    (model(x) - torch.randn(8, 3, dtype=torch.float64)).square().mean().backward()


def vector(model: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def one_rank(name: str, algorithm: str, fused_backward: bool, extra: str) -> tuple[list[float], list[float]]:
    model, rank = build(name), dist.get_rank()
    opt = fusedfog.AdamW(
        model.parameters(), lr=0.01, algorithm=algorithm, topology="ring", bucket_mb=2e-4, fused_backward=fused_backward
    )
    for step in range(STEPS):
        if extra == "set to zero":
            opt.zero_grad(set_to_none=False)
        elif extra == "before forward":
            model.zero_grad()
        if extra == "unfreeze" and step == 2:
            next(model.parameters()).requires_grad_(True)
        if extra == "evaluation" and step == rank:
            model.eval()
            with torch.no_grad():
                model(torch.ones(8, 6, dtype=torch.float64))
            model.train()
        backward(model, rank, step)
        opt.step()
        if extra not in ("set to zero", "before forward"):
            opt.zero_grad()
    opt.drain()
    return vector(model), [b.sum().item() for b in model.buffers() if b.is_floating_point()]


def by_hand(name: str, algorithm: str, extra: str) -> list[tuple[list[float], list[float]]]:
    models = [build(name) for _ in range(RANKS)]
    inner = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in models]
    for step in range(STEPS):
        for rank, (model, opt) in enumerate(zip(models, inner, strict=True)):
            if extra == "unfreeze" and step == 2:
                next(model.parameters()).requires_grad_(True)
            opt.zero_grad()
            backward(model, rank, step)
        before = [[p.detach().clone() for p in model.parameters()] for model in models]
        for opt in inner:
            opt.step()
        after = [[p.detach().clone() for p in model.parameters()] for model in models]
        sent = before if algorithm == "awc" else after
        for i, model in enumerate(models):
            for k, param in enumerate(model.parameters()):
                mixed = sum(W[i][j] * (sent[j][k] - sent[i][k]) for j in range(RANKS))
                param.data = after[i][k] + mixed
    return [(vector(m), [b.sum().item() for b in m.buffers() if b.is_floating_point()]) for m in models]


def check(ranks: Pool, name: str, algorithm: str, fused_backward: bool, extra: str = "") -> None:
    found = ranks.run(RANKS, one_rank, name, algorithm, fused_backward, extra)
    for ours, theirs in zip(found, by_hand(name, algorithm, extra), strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-9, atol=1e-10)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("fused_backward", [False, True], ids=["step", "fused_backward"])
@pytest.mark.parametrize("algorithm", ["awc", "atc"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_trains_as_its_copies_mixed_by_hand(
    ranks: Pool, name: str, algorithm: str, fused_backward: bool
) -> None:
    check(ranks, name, algorithm, fused_backward)


@pytest.mark.parametrize("fused_backward", [False, True], ids=["step", "fused_backward"])
@pytest.mark.parametrize("extra", ["set to zero", "before forward", "evaluation"])
def test_where_zero_grad_stands_and_what_is_evaluated_makes_no_difference(
    ranks: Pool, extra: str, fused_backward: bool
) -> None:
    check(ranks, "batch_norm" if extra != "evaluation" else "plain", "awc", fused_backward, extra)


@pytest.mark.parametrize("fused_backward", [False, True], ids=["step", "fused_backward"])
def test_a_parameter_may_be_unfrozen_in_mid_run(ranks: Pool, fused_backward: bool) -> None:
    check(ranks, "frozen", "awc", fused_backward, "unfreeze")


def buffers_inside_averaged() -> tuple[list[float], list[float], list[float]]:
    model, rank = build("batch_norm"), dist.get_rank()
    opt = fusedfog.SGD(model.parameters(), lr=0.1, model=model)
    for step in range(3):
        backward(model, rank, step)
        opt.step()
    norm = model[1]
    before = norm.running_mean.clone()
    with opt.averaged(model):
        inside = norm.running_mean.tolist()
    assert torch.equal(norm.running_mean, before)
    opt.drain()
    return before.tolist(), inside, vector(model)


def test_batch_norm_statistics_are_averaged_inside_averaged_and_restored(ranks: Pool) -> None:
    found = ranks.run(RANKS, buffers_inside_averaged)
    mean = torch.tensor([before for before, _, _ in found]).mean(0)
    for before, inside, _ in found:
        torch.testing.assert_close(torch.tensor(inside), mean)
        assert not torch.allclose(torch.tensor(before), mean)


def test_an_uninitialized_lazy_parameter_is_named() -> None:
    net = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(ValueError, match="parameter 0 is lazy and has no shape yet"):
        fusedfog.SGD(net.parameters(), lr=0.1)


@pytest.mark.parametrize("fused_backward", [False, True], ids=["step", "fused_backward"])
def test_a_closure_is_called_once_and_its_loss_returned(fused_backward: bool) -> None:
    model, twin = plain(), plain()
    twin.load_state_dict(model.state_dict())
    opt, calls = fusedfog.SGD(model.parameters(), lr=0.1, fused_backward=fused_backward), []

    def closure() -> Tensor:
        calls.append(vector(model))
        opt.zero_grad()
        loss = model(torch.ones(2, 6)).square().sum()
        loss.backward()
        return loss

    loss = opt.step(closure)
    assert loss.item() > 0 and calls == [vector(twin)]
    twin(torch.ones(2, 6)).square().sum().backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    torch.testing.assert_close(vector(model), vector(twin))


def moved(change: str) -> str:
    model: Any = plain()
    opt = fusedfog.SGD(model.parameters(), lr=0.1)
    if change == "dtype":
        model.double()
    elif change == "data":
        model[0].weight.data = torch.zeros(6, 8)
    with pytest.raises(fusedfog.StorageReplacedError) as caught:
        opt.step()
    return str(caught.value)


@pytest.mark.parametrize("change", ["dtype", "data"])
def test_a_parameter_that_left_the_flat_buffer_is_named_with_the_way_out(change: str) -> None:
    message = moved(change)
    assert "parameter 0" in message and "build the optimizer last" in message
