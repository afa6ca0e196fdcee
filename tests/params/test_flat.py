"""Adopting parameters into flat storage changes where they live and nothing else."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import fusedfog


class Net(nn.Module):
    """Convolution (made channels_last), tied linear weights, a scalar, an empty and an expanded-shape parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.one = nn.Linear(7, 7)
        self.two = nn.Linear(7, 7)
        self.two.weight = self.one.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.none = nn.Parameter(torch.empty(0, 4))
        self.turned = nn.Parameter(torch.randn(6, 4).t())
        self.to(memory_format=torch.channels_last)


def test_values_shapes_strides_and_ties_survive() -> None:
    net = Net()
    before = {name: (p.detach().clone(), p.stride(), id(p)) for name, p in net.named_parameters()}
    fusedfog.AdamW(net.parameters())
    for name, p in net.named_parameters():
        value, stride, identity = before[name]
        assert torch.equal(p, value)
        assert p.stride() == stride
        assert id(p) == identity
    assert net.one.weight is net.two.weight
    assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_parameters_lie_in_one_buffer_and_save_as_independent_tensors(dtype: torch.dtype) -> None:
    net = nn.Sequential(*(nn.Linear(33, 33) for _ in range(4))).to(dtype)
    fusedfog.SGD(net.parameters(), lr=0.1)
    pointers = [p.data_ptr() for p in net.parameters()]
    span = max(pointers) - min(pointers)
    assert span < sum(p.numel() + 64 for p in net.parameters()) * dtype.itemsize
    file = io.BytesIO()
    torch.save(net[0].weight, file)
    assert file.tell() < 33 * 33 * dtype.itemsize + 4096


def test_states_save_as_independent_tensors() -> None:
    net = nn.Sequential(*(nn.Linear(100, 100) for _ in range(10)))
    opt = fusedfog.AdamW(net.parameters())
    net(torch.randn(2, 100)).sum().backward()
    opt.step()
    file = io.BytesIO()
    torch.save(opt.state[net[0].weight]["exp_avg"], file)
    assert file.tell() < 100 * 100 * 4 + 4096


def test_model_load_state_dict_zero_grad_and_edits_keep_working() -> None:
    net, other = nn.Linear(5, 3), nn.Linear(5, 3)
    opt = fusedfog.SGD(net.parameters(), lr=0.1, model=net)
    net.load_state_dict(other.state_dict())
    assert torch.equal(net.weight, other.weight)
    with torch.no_grad():
        net.weight.mul_(2)
    net(torch.ones(1, 5)).sum().backward()
    expected = net.weight.detach() - 0.1 * net.weight.grad
    opt.step()
    torch.testing.assert_close(net.weight.detach(), expected)
    net.zero_grad()
    assert net.weight.grad is None


def test_autograd_still_catches_use_of_values_that_a_pass_has_replaced() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    opt = fusedfog.SGD(net.parameters(), lr=0.1)
    loss = net(torch.randn(2, 4, requires_grad=True)).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last])
def test_gradients_in_another_memory_order_are_understood(fmt: torch.memory_format) -> None:
    p = nn.Parameter(torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last))
    q = nn.Parameter(p.detach().clone())
    g = torch.randn(2, 3, 4, 5).to(memory_format=fmt)
    p.grad, q.grad = g.clone(memory_format=torch.preserve_format), g.clone(memory_format=torch.preserve_format)
    fusedfog.SGD([p], lr=0.5).step()
    torch.optim.SGD([q], lr=0.5).step()
    assert torch.equal(p, q)


@pytest.mark.parametrize(
    "replace",
    [
        lambda net: setattr(net.weight, "data", torch.zeros(5, 3)),
        lambda net: net.double(),
        lambda net: net.to(memory_format=torch.preserve_format, dtype=torch.bfloat16),
    ],
)
def test_a_replaced_storage_is_named(replace: object) -> None:
    net = nn.Linear(5, 3)
    opt = fusedfog.SGD(net.parameters(), lr=0.1, model=net)
    replace(net)  # type: ignore[operator]
    with pytest.raises(fusedfog.StorageReplacedError, match=r"parameter weight .*model.to"):
        opt.step()


def test_deepcopy_gives_an_independent_model_and_optimizer() -> None:
    net = nn.Linear(5, 3)
    opt = fusedfog.AdamW(net.parameters(), lr=0.1)
    net(torch.ones(1, 5)).sum().backward()
    opt.step()
    net2, opt2 = copy.deepcopy((net, opt))
    assert opt2.param_groups[0]["params"][0] is net2.weight
    for n, o in ((net, opt), (net2, opt2)):
        o.zero_grad()
        n(torch.full((1, 5), 2.0)).sum().backward()
        o.step()
    assert torch.equal(net.weight, net2.weight)
    assert opt2.state[net2.weight]["step"].item() == 2
    opt2.step()
    assert not torch.equal(net.weight, net2.weight)


def test_parameters_that_share_memory_without_being_one_object_are_refused() -> None:
    base = torch.randn(10)
    with pytest.raises(ValueError, match="parameters 0 and 1 share memory"):
        fusedfog.SGD([nn.Parameter(base[:6]), nn.Parameter(base[4:])], lr=0.1)


def test_evaluation_of_a_parameter_that_left_is_refused_too() -> None:
    model = torch.nn.Linear(3, 2)
    opt = fusedfog.SGD(model.parameters(), lr=0.1)
    model.weight.data = model.weight.data.double()
    with pytest.raises(fusedfog.StorageReplacedError), opt.averaged(model):
        pass
    with pytest.raises(fusedfog.StorageReplacedError):
        opt.consensus_distance()
