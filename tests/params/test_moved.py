"""torch's own utilities give parameters new storages: the flat buffer takes them back, and training goes on as torch's."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from io import BytesIO
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from support.pool import Pool
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, parametrize, prune, vector_to_parameters

import fusedfog


class Doubled(nn.Module):
    """A parametrization with an inverse, so that registering it rewrites the original."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x

    def right_inverse(self, x: Tensor) -> Tensor:
        return x / 2


def pruned(net: nn.Module) -> None:
    prune.random_unstructured(net[0], "weight", amount=0.5)  # type: ignore[index]
    prune.remove(net[0], "weight")  # type: ignore[index]


def parametrized_and_back(net: nn.Module) -> None:
    parametrize.register_parametrization(net[0], "weight", Doubled())  # type: ignore[index]
    parametrize.remove_parametrizations(net[0], "weight")  # type: ignore[index]


def on_a_queue(net: nn.Module) -> None:
    pickle.loads(ForkingPickler.dumps(net.state_dict()))


def swapped(net: nn.Module) -> None:
    net[0].weight.data = torch.full_like(net[0].weight, 0.25)  # type: ignore[index]


def loaded_by_assignment(net: nn.Module) -> None:
    for param in net.parameters():
        buffer = BytesIO()
        torch.save(param.data, buffer)
        buffer.seek(0)
        param.data = torch.load(buffer)


MOVES: dict[str, Callable[[Any], object]] = {
    "vector_to_parameters": lambda net: vector_to_parameters(1.5 * parameters_to_vector(net.parameters()), net.parameters()),
    "prune": pruned,
    "parametrization": parametrized_and_back,
    "share_memory": lambda net: net.share_memory(),
    "multiprocessing queue": on_a_queue,
    "p.data = values": swapped,
    "p.data = loaded": loaded_by_assignment,
    "half and back": lambda net: net.half().float(),
    "channels_last": lambda net: net.to(memory_format=torch.channels_last),
    "contiguous": lambda net: [setattr(p, "data", p.data.clone(memory_format=torch.contiguous_format)) for p in net.parameters()],
    "turned around": lambda net: setattr(net[1].weight, "data", net[1].weight.data.t()),
    "set_": lambda net: [p.data.set_(p.data.clone()) for p in net.parameters()],
}  # fmt: skip


def net_of() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 4, 2), nn.Linear(3, 3), nn.Flatten(), nn.Linear(36, 2))


def train(net: nn.Module, opt: Any, move: Callable[[Any], object], steps: int = 5) -> Tensor:
    for step in range(steps):
        torch.manual_seed(step)
        if step in (1, 2):
            move(net)
        opt.zero_grad()
        net(torch.randn(5, 2, 4, 4)).square().mean().backward()
        opt.step()
    return torch.cat([value.flatten() for _, value in sorted(net.state_dict().items())])


@pytest.mark.parametrize("fused_backward", [False, True], ids=["step", "fused_backward"])
@pytest.mark.parametrize("name", MOVES)
def test_a_moved_parameter_is_taken_back_and_trains_as_with_torch(name: str, fused_backward: bool) -> None:
    ours, theirs = net_of(), net_of()
    opt = fusedfog.AdamW(ours.parameters(), lr=0.1, fused_backward=fused_backward, bucket_mb=1e-4)
    params = list(ours.parameters())
    homes = [p.data_ptr() for p in params]
    found = train(ours, opt, MOVES[name])
    torch.testing.assert_close(found, train(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.1), MOVES[name]))
    assert [p.data_ptr() for p in params] == homes


@pytest.mark.parametrize("name", ["vector_to_parameters", "share_memory", "p.data = values"])
def test_around_other_optimizers_too(name: str) -> None:
    ours, theirs = net_of(), net_of()
    found = train(ours, fusedfog.Decentralized(torch.optim.RMSprop(ours.parameters())), MOVES[name])
    torch.testing.assert_close(found, train(theirs, torch.optim.RMSprop(theirs.parameters()), MOVES[name]))


@pytest.mark.parametrize("moved", [0, 1, 2, 3, 299])
def test_of_many_parameters_each_is_taken_back_before_the_pass_that_would_miss_it(moved: int) -> None:
    params = [nn.Parameter(torch.ones(1)) for _ in range(300)]
    opt = fusedfog.SGD(params, lr=0.25)
    for _ in range(6):
        params[moved].data = params[moved].data.clone()
        for param in params:
            param.grad = torch.ones(1)
        opt.step()
    assert all(param.item() == 1 - 6 * 0.25 for param in params)


def test_evaluation_finds_the_values_that_a_moved_parameter_has() -> None:
    net = net_of()
    opt = fusedfog.SGD(net.parameters(), lr=0.1)
    swapped(net)
    with opt.averaged(net):
        assert torch.equal(net[0].weight, torch.full_like(net[0].weight, 0.25))  # type: ignore[index]
    assert opt.consensus_distance() == 0


def test_stale_views_of_a_moved_parameter_are_caught_by_autograd() -> None:
    weight = nn.Parameter(torch.ones(3, 3))
    opt = fusedfog.SGD([weight], lr=0.1)
    x = torch.ones(3, requires_grad=True)
    loss = (weight.t() @ x).square().sum()
    weight.data = weight.data.clone()
    assert opt.consensus_distance() == 0  # takes it back, over memory that the graph refers to
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def moved_while_sent(values: bool) -> tuple[float, list[float]]:
    weight = nn.Parameter(torch.arange(4.0))
    opt = fusedfog.SGD([weight], lr=0.0)
    for _ in range(3):
        weight.grad = torch.zeros(4)
        opt.step()
    weight.data = torch.full((4,), 2.0) if values else weight.data.clone()
    opt.step()
    opt.drain()
    return opt.stats()["torn_messages"], weight.tolist()


@pytest.mark.filterwarnings("ignore:.*were edited in place")
def test_moved_values_count_as_an_edit_of_what_is_being_sent_and_mere_moves_do_not(ranks: Pool) -> None:
    for torn, found in ranks.run(2, moved_while_sent, False):
        assert torn == 0 and found == [0.0, 1.0, 2.0, 3.0]
    for torn, _ in ranks.run(2, moved_while_sent, True):
        assert torn == 1
