"""Under `fused_backward` users' hooks see gradients, whenever they were registered, and gradients are freed all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.pool import Pool
from torch import Tensor, nn

import fusedfog


def net_of() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))


def twice(param: Tensor) -> None:
    assert param.grad is not None
    param.grad.mul_(2)


def one_rank(algorithm: str, bucket_mb: float, when: str) -> tuple[list[float], int, bool]:
    net, seen = net_of(), 0

    def look(param: Tensor) -> None:
        nonlocal seen
        seen += param.grad is not None

    def register() -> None:
        for param in net.parameters():
            param.register_post_accumulate_grad_hook(look)
            param.register_post_accumulate_grad_hook(twice)

    if when == "before":
        register()
    opt = fusedfog.SGD(
        net.parameters(), lr=0.1, algorithm=algorithm, topology="ring", fused_backward=True, bucket_mb=bucket_mb
    )
    freed = True
    for step in range(3):
        if when == "after" and step == 0:
            register()
        torch.manual_seed(step)
        net(torch.randn(5, 3)).square().mean().backward()
        if algorithm != "awc":  # there a message may come late, and its bucket wait for step()
            freed = freed and all(param.grad is None for param in net.parameters())
        opt.step()
        freed = freed and all(param.grad is None for param in net.parameters())
    opt.drain()
    return torch.cat([p.detach().flatten() for p in net.parameters()]).tolist(), seen, freed


def by_hand() -> Tensor:
    net = net_of()
    opt = torch.optim.SGD(net.parameters(), lr=0.1)
    for step in range(3):
        torch.manual_seed(step)
        opt.zero_grad()
        net(torch.randn(5, 3)).square().mean().backward()
        for param in net.parameters():
            twice(param)
        opt.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("bucket_mb", [1e-5, 25])
@pytest.mark.parametrize("algorithm", ["local", "awc", "atc"])
def test_a_hook_sees_and_changes_the_gradient_whenever_it_was_registered(
    ranks: Pool, algorithm: str, bucket_mb: float, when: str
) -> None:
    for found, seen, freed in ranks.run(2, one_rank, algorithm, bucket_mb, when):
        torch.testing.assert_close(torch.tensor(found), by_hand())
        assert seen == 18 and freed


def test_a_bucket_is_passed_before_the_next_gradient_is_computed() -> None:
    """Else its message would leave a layer later, and a network that is as slow as backward would never catch up."""
    net, seen = net_of(), []
    opt = fusedfog.SGD(net.parameters(), lr=0.1, fused_backward=True, bucket_mb=1e-5)

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            seen.extend(not torch.equal(p, value) for p, value in zip(net.parameters(), values, strict=True))
            return grads[0]

    values = [p.detach().clone() for p in net.parameters()]
    net[2:](Looks.apply(net[:2](torch.ones(2, 3)))).sum().backward()
    assert seen == [False, False, True, True, True, True]
    opt.step()


def test_a_backward_that_fails_half_way_leaves_what_follows_right() -> None:
    net = net_of()
    opt = fusedfog.SGD(net.parameters(), lr=0.1, fused_backward=True, bucket_mb=1e-5)

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            raise OSError("half way")

    values = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(OSError, match="half way"):
        net[2:](Fails.apply(net[:2](torch.ones(2, 3)))).sum().backward()
    opt.step()
    changed = [not torch.equal(p, value) for p, value in zip(net.parameters(), values, strict=True)]
    assert changed == [False, False, True, True, True, True]
