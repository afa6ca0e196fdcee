"""What is not trained is neither sent nor given states, but equal; what is not mixed nobody else touches."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from support.waits import meet, shorten
from torch import Tensor, nn

import fusedfog

BUILDERS: dict[str, Any] = {
    "awc": lambda groups, **options: fusedfog.SGD(groups, lr=0.1, momentum=0.9, **options),
    "atc": lambda groups, **options: fusedfog.SGD(groups, lr=0.1, momentum=0.9, algorithm="atc", **options),
    "push_sum": lambda groups, **options: fusedfog.SGD(groups, lr=0.1, algorithm="push_sum", **options),
    "allreduce": lambda groups, **options: fusedfog.SGD(groups, lr=0.1, algorithm="allreduce", **options),
    "tracking": lambda groups, **options: fusedfog.SGD(groups, lr=0.1, algorithm="gradient_tracking", **options),
    "fused": lambda groups, **options: fusedfog.AdamW(groups, lr=0.1, fused_backward=True, **options),
    "int8": lambda groups, **options: fusedfog.AdamW(groups, lr=0.1, wire_dtype="int8", **options),
    "capturable": lambda groups, **options: fusedfog.AdamW(groups, lr=0.1, capturable=True, measure=True, **options),
    "norms": lambda groups, **options: fusedfog.SGD(groups, lr=0.1, max_grad_norm=0.5, measure=True, **options),
    "outer": lambda groups, **options: fusedfog.SGD(
        groups, lr=0.1, algorithm="local", outer=fusedfog.Outer(every=2), **options
    ),
    "wrapped": lambda groups, **options: fusedfog.Decentralized(
        torch.optim.SGD(groups, lr=0.1, momentum=0.9), **options
    ),
}


def flat(params: Any) -> list[float]:
    return torch.cat([param.detach().reshape(-1).double() for param in params]).tolist()


def own_net(rank: int) -> nn.Sequential:
    torch.manual_seed(rank)
    return nn.Sequential(nn.Linear(6, 70), nn.Tanh(), nn.Linear(70, 70), nn.Tanh(), nn.Linear(70, 3))


def backward(net: nn.Module, rank: int, step: int) -> None:
    generator = torch.Generator().manual_seed(100 * step + rank)
    net.zero_grad()
    net(torch.randn(4, 6, generator=generator)).square().mean().backward()


# -- frozen ------------------------------------------------------------------------------------------------------------


def train_with_a_frozen_middle(name: str, unfreeze: str) -> dict[str, Any]:
    rank, net = dist.get_rank(), own_net(dist.get_rank())
    net[2].requires_grad_(False)
    opt = BUILDERS[name](net.parameters())
    at_first = flat(net.parameters())
    sent = []
    for step in range(8):
        if step == 4 and unfreeze == "flag":
            net[2].requires_grad_(True)
        before = opt.stats()["bytes_sent"]
        backward(net, rank, step)
        if step == 4 and unfreeze == "gradient":
            for param in net[2].parameters():
                param.grad = torch.full_like(param, 0.1 * rank)
        opt.step()
        sent.append(opt.stats()["bytes_sent"] - before)
        if step == 3:
            frozen, states = flat(net[2].parameters()), len(opt.state_dict()["state"])
    saved = opt.state_dict()
    opt.load_state_dict(saved)
    opt.drain()
    return {
        "first": at_first,
        "frozen": frozen,
        "states": states,
        "sent": sent,
        "middle": flat(net[2].parameters()),
        "keys": sorted(saved["state"]),
        "distance": opt.consensus_distance(),
    }


@pytest.mark.parametrize("unfreeze", ["flag", "gradient"])
@pytest.mark.parametrize("name", BUILDERS)
def test_frozen_parameters_are_equal_and_not_sent_until_they_are_trained(ranks: Pool, name: str, unfreeze: str) -> None:
    if name == "fused" and unfreeze == "gradient":
        pytest.skip("its hooks have made the passes by then, so such a gradient counts from the next step on")
    one, other = ranks.run(2, train_with_a_frozen_middle, name, unfreeze)
    assert one["first"] == other["first"]
    assert one["frozen"] == other["frozen"]
    assert one["states"] <= 4  # the frozen two have none
    assert one["middle"] != one["frozen"] and other["middle"] != other["frozen"]
    assert max(one["sent"][5:]) > 5 * max(one["sent"][1:4])  # 5000 of 6000 numbers lie in the middle
    if name != "wrapped":
        assert one["keys"] == other["keys"] and set(one["keys"]) <= set(range(6))


def flat_against_torch(rounds: int) -> list[bool]:
    """Alone, a model that is unfrozen layer by layer and frozen again trains as by torch's own optimizer."""
    net, twin = own_net(0), own_net(0)
    nets = (net, twin)
    for one in nets:
        one[0].requires_grad_(False)
        one[2].requires_grad_(False)
    opt, reference = fusedfog.AdamW(net.parameters(), lr=0.1), torch.optim.AdamW(twin.parameters(), lr=0.1)
    equal = []
    for step in range(rounds):
        for one in nets:
            one[2].requires_grad_(step >= 3)
            one[0].requires_grad_(step >= 6)
            one[4].requires_grad_(step < 8)
            backward(one, 0, step)
        opt.step()
        reference.step()
        equal.append(
            all(torch.allclose(p, q, atol=1e-4) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
        )
        equal.append(sorted(opt.state_dict()["state"]) == sorted(reference.state_dict()["state"]))
    return equal


def test_alone_unfreezing_and_freezing_is_as_in_torch() -> None:
    assert all(flat_against_torch(11))


def test_an_optimizer_of_frozen_parameters_alone_works_and_waits() -> None:
    net = own_net(0).requires_grad_(False)
    opt = fusedfog.AdamW(net.parameters(), lr=0.1, measure=True)
    before = flat(net.parameters())
    opt.step()
    assert flat(net.parameters()) == before and opt.stats()["steps"] == 1
    assert not opt.state and opt.consensus_distance() == 0.0
    with opt.averaged():
        pass
    opt.load_state_dict(opt.state_dict())
    net.requires_grad_(True)
    backward(net, 0, 0)
    opt.step()
    assert flat(net.parameters()) != before and len(opt.state) == 6


def all_frozen_at_first(name: str) -> list[float]:
    net = own_net(dist.get_rank()).requires_grad_(False)
    opt = BUILDERS[name](net.parameters())
    opt.step()
    net.requires_grad_(True)
    for step in range(2):
        backward(net, dist.get_rank(), step)
        opt.step()
    with opt.averaged(net):
        return flat(net.parameters())


@pytest.mark.parametrize("name", BUILDERS)
def test_ranks_unfreeze_a_whole_optimizer_together(ranks: Pool, name: str) -> None:
    one, other = ranks.run(2, all_frozen_at_first, name)
    assert one == other


def test_loaded_states_of_frozen_parameters_are_used_once_they_are_trained() -> None:
    net = own_net(0)
    opt = fusedfog.AdamW(net.parameters(), lr=0.1)
    for step in range(2):
        backward(net, 0, step)
        opt.step()
    saved = opt.state_dict()
    again = own_net(0)
    again.load_state_dict(net.state_dict())
    again[0].requires_grad_(False)
    resumed = fusedfog.AdamW(again.parameters(), lr=0.1)
    resumed.load_state_dict(saved)
    assert sorted(resumed.state_dict()["state"]) == sorted(saved["state"])
    again[0].requires_grad_(True)
    for one, optimizer in ((net, opt), (again, resumed)):
        backward(one, 0, 3)
        optimizer.step()
    assert flat(net.parameters()) == flat(again.parameters())


def unfreeze_alone(fused: bool) -> None:
    net = own_net(dist.get_rank())
    net[2].requires_grad_(False)
    opt = fusedfog.SGD(net.parameters(), lr=0.1, fused_backward=fused)
    for step in range(6):
        if step == 2:
            meet("trained")
        if step == 2 and dist.get_rank() == 1:
            net[2].requires_grad_(True)
            # On this rank alone: the other waits for its messages meanwhile, and must not be the first to give up.
            shorten(2.0)
        backward(net, dist.get_rank(), step)
        opt.step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_rank_that_unfreezes_alone_gets_an_error_that_says_so(ranks: Pool, fused: bool) -> None:
    outcomes = ranks.outcomes(2, unfreeze_alone, fused)
    assert outcomes[1].error_type == "PeerTimeout"
    assert "This rank unfreezes 2 and 1 more" in outcomes[1].message
    assert "unfreeze the same parameters" in outcomes[1].message
    assert outcomes[0].error_type in ("PeerTimeout", "ExchangeError")


def unfreeze_differently() -> None:
    net = own_net(dist.get_rank())
    net.requires_grad_(False)
    net[0].requires_grad_(True)
    opt = fusedfog.SGD(net.parameters(), lr=0.1)
    net[2 + 2 * dist.get_rank()].requires_grad_(True)
    backward(net, dist.get_rank(), 0)
    opt.step()


def frozen_differently() -> None:
    net = own_net(dist.get_rank())
    net[2].weight.requires_grad_(dist.get_rank() == 0)
    fusedfog.SGD(net.parameters(), lr=0.1)


def test_ranks_that_freeze_or_unfreeze_differently_are_told(ranks: Pool) -> None:
    for outcome in ranks.outcomes(2, unfreeze_differently):
        assert outcome.error_type == "MismatchError" and "parameter 4 of group 0" in outcome.message
    for outcome in ranks.outcomes(2, frozen_differently):
        assert outcome.error_type == "MismatchError"
        assert "parameter 2 (2) is shape (70, 70) float32 in group 0, frozen on rank 1 but shape" in outcome.message


def a_group_with_frozen_ones_is_added() -> tuple[list[float], list[float]]:
    net = own_net(dist.get_rank())
    net[4].weight.requires_grad_(False)
    opt = fusedfog.SGD(net[0].parameters(), lr=0.1)
    opt.add_param_group({"params": list(net[4].parameters())})
    for step in range(3):
        backward(net, dist.get_rank(), step)
        opt.step()
    first = flat([net[4].weight])
    net[4].weight.requires_grad_(True)
    backward(net, dist.get_rank(), 3)
    opt.step()
    return first, flat([net[4].weight])


def test_an_added_group_may_have_frozen_parameters(ranks: Pool) -> None:
    (first, later), (other_first, other_later) = ranks.run(2, a_group_with_frozen_ones_is_added)
    assert first == other_first and later != first and other_later != other_first


# -- the rest of the model ---------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A frozen base of all kinds of tensors, and a small trained adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 6).requires_grad_(False)
        self.sixteen = nn.Parameter(torch.randn(5).bfloat16(), requires_grad=False)
        self.codes = nn.Parameter(torch.randint(0, 9, (4, 3), dtype=torch.uint8), requires_grad=False)
        self.turned = nn.Parameter(torch.randn(4, 3).t(), requires_grad=False)
        self.adapter = nn.Linear(6, 3)
        self.head = nn.Linear(3, 1)
        self.norm = nn.BatchNorm1d(6)
        self.register_buffer("mask", torch.rand(3) > 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.adapter(self.norm(self.base(x))))


def adapted(how: str) -> list[float]:
    torch.manual_seed(dist.get_rank())
    net = Adapted()
    nn.init.normal_(net.norm.running_mean)
    held = net.parameters() if how == "all" else net.adapter.parameters()
    options = {} if how == "no sync" else {"model": net}
    opt = fusedfog.AdamW(held, lr=0.1, sync_init=how != "no sync", **options)
    sent_at_first = opt.stats()["bytes_sent"]
    backward(net, dist.get_rank(), 0)
    everything = flat([*net.parameters(), *net.buffers()]) if how == "no sync" else flat([*net.state_dict().values()])
    opt.step()
    assert how == "all" or opt.stats()["bytes_sent"] - sent_at_first <= 2 * 4 * 128 * (1 + 1)
    return everything


@pytest.mark.parametrize("how", ["adapter", "all", "no sync"])
def test_with_model_everything_of_it_is_made_equal(ranks: Pool, how: str) -> None:
    one, other = ranks.run(2, adapted, how)
    if how == "no sync":
        assert one != other
    else:
        # running statistics have seen one batch of each rank's own
        differ = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        assert len(differ) <= 12


def bases_differ() -> None:
    net = nn.ModuleDict({"base": nn.Linear(6, 6 + dist.get_rank()), "adapter": nn.Linear(6, 3)})
    net["base"].requires_grad_(False)
    fusedfog.SGD(net["adapter"].parameters(), lr=0.1, model=net)


def test_models_whose_untrained_parts_differ_in_shape_are_named(ranks: Pool) -> None:
    for outcome in ranks.outcomes(2, bases_differ):
        assert outcome.error_type == "MismatchError"
        assert "base.weight of the model, which this optimizer does not train is shape (7, 6)" in outcome.message


# -- mix=False ---------------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """A trunk that all ranks share around experts that each rank has its own number and sizes of."""

    def __init__(self, rank: int, same: bool) -> None:
        super().__init__()
        torch.manual_seed(rank)
        self.first = nn.Linear(6, 6)
        count = 2 if same else rank
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 9 if same else 9 + rank), nn.BatchNorm1d(9 if same else 9 + rank))
            for _ in range(count)
        )
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for expert in self.experts:
            x = x + expert(x).mean(1, keepdim=True)
        return self.last(x)


def groups_of(net: Experts, order: str) -> list[dict[str, Any]]:
    trunk = {"params": [*net.first.parameters(), *net.last.parameters()]}
    experts = {"params": list(net.experts.parameters()), "mix": False}
    return {
        "behind": [trunk, experts],
        "before": [experts, trunk],
        "absent": [trunk] + [experts] * bool(experts["params"]),
    }[order]


def train_experts(name: str, order: str, experts: bool, with_model: bool) -> dict[str, Any]:
    """Trunk and experts trained together; without experts in the optimizer, the trunk alone, from the same gradients."""
    rank = dist.get_rank()
    net = Experts(rank, same=False)
    own = flat(net.experts.parameters()) if len(net.experts) else []
    groups = groups_of(net, order) if experts else [groups_of(net, "behind")[0]]
    options: dict[str, Any] = {"bucket_mb": 1e-6}
    if with_model:
        options["model"] = net
    opt = BUILDERS[name](groups, **options)
    after = flat(net.experts.parameters()) if len(net.experts) else []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + rank)
        opt.zero_grad()
        trunk = [*net.first.parameters(), *net.last.parameters()]
        loss = sum((param * torch.randn(param.shape, generator=generator)).sum() for param in trunk)
        for param in net.experts.parameters():
            loss = loss + param.sum() * 0.001
        loss.backward()
        opt.step()
    opt.drain()
    before_average = flat(net.experts.parameters()) if len(net.experts) else []
    own_buffers = [buffer.clone() for buffer in net.buffers()]
    with opt.averaged(net if experts else nn.Module()):
        inside = flat(net.experts.parameters()) if len(net.experts) else []
        mean = flat(trunk)
        assert all(torch.equal(a, b) for a, b in zip(own_buffers, net.buffers(), strict=True))
    opt.load_state_dict(opt.state_dict())
    return {
        "own": own,
        "after": after,
        "inside": inside,
        "before": before_average,
        "trunk": flat(trunk),
        "mean": mean,
        "distance": opt.consensus_distance(),
        "bytes": opt.stats()["bytes_sent"],
    }


@pytest.mark.parametrize(
    "order", ["before", *(pytest.param(one, marks=pytest.mark.slow) for one in ("behind", "absent"))]
)
@pytest.mark.parametrize("name", BUILDERS)
def test_experts_of_any_number_and_shape_leave_what_is_shared_alone(ranks: Pool, name: str, order: str) -> None:
    found = ranks.run(3 if name in ("awc", "allreduce") else 2, train_experts, name, order, True, order == "behind")
    alone = ranks.run(len(found), train_experts, name, order, False, False)
    for rank, (one, trunk_only) in enumerate(zip(found, alone, strict=True)):
        assert one["own"] == one["after"]  # nobody's values but its own
        assert one["inside"] == one["before"]
        assert rank == 0 or one["before"] != one["own"]  # trained
        if name != "norms":  # whose clipping counts all gradients of the rank
            assert one["trunk"] == trunk_only["trunk"]
        assert one["bytes"] == trunk_only["bytes"]
        assert one["mean"] == found[0]["mean"]


def own_gradients_of_experts() -> tuple[float, float]:
    shared, own = nn.Parameter(torch.zeros(5)), nn.Parameter(torch.zeros(7))
    opt = fusedfog.SGD([{"params": [shared]}, {"params": [own], "mix": False}], lr=1.0, algorithm="allreduce")
    shared.grad, own.grad = torch.full((5,), dist.get_rank() + 1.0), torch.full((7,), dist.get_rank() + 1.0)
    opt.step()
    return shared[0].item(), own[0].item()


def test_allreduce_leaves_unmixed_gradients_to_their_rank(ranks: Pool) -> None:
    assert ranks.run(2, own_gradients_of_experts) == [(-1.5, -1.0), (-1.5, -2.0)]


def added_by_one_rank(name: str) -> list[float]:
    rank = dist.get_rank()
    shared, own = nn.Parameter(torch.full((300,), float(rank))), nn.Parameter(torch.zeros(7))
    opt = BUILDERS[name]([shared], sync_init=False)
    for step in range(6):
        shared.grad = torch.ones(300) * step
        if step == 2 and rank == 1:
            opt.add_param_group({"params": [own], "mix": False})
        if step >= 2 and rank == 1:
            own.grad = torch.ones(7)
        opt.step()
    assert rank == 0 or own[0].item() != 0
    opt.drain()
    return shared.tolist()


@pytest.mark.parametrize("name", ["awc", "atc", "allreduce", "tracking", "int8", "wrapped"])
def test_one_rank_may_add_a_group_of_its_own(ranks: Pool, name: str) -> None:
    found = ranks.run(2, added_by_one_rank, name)
    assert found == ranks.run(2, never_added, name)


def never_added(name: str) -> list[float]:
    shared = nn.Parameter(torch.full((300,), float(dist.get_rank())))
    opt = BUILDERS[name]([shared], sync_init=False)
    for step in range(6):
        shared.grad = torch.ones(300) * step
        opt.step()
    opt.drain()
    return shared.tolist()


@pytest.mark.parametrize("name", BUILDERS)
def test_an_empty_first_group_works(ranks: Pool, name: str) -> None:
    assert ranks.run(2, empty_group_first, name) == ranks.run(2, never_empty, name)


def empty_group_first(name: str) -> list[float]:
    return trained([{"params": []}], name)


def never_empty(name: str) -> list[float]:
    return trained([], name)


def trained(before: list[dict[str, Any]], name: str) -> list[float]:
    param = nn.Parameter(torch.full((100,), float(dist.get_rank())))
    opt = BUILDERS[name]([*before, {"params": [param]}], sync_init=False)
    for step in range(4):
        param.grad = torch.full((100,), 1.0 + step)
        opt.step()
    opt.drain()
    return param.tolist()


# -- averaged() and buffers --------------------------------------------------------------------------------------------


def test_averaged_without_the_model_warns_once_of_buffers_that_it_leaves_out() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False))
    opt = fusedfog.SGD(net.parameters(), lr=0.1)
    with (
        pytest.warns(UserWarning, match=r"not 1.running_mean and 1 more: Sequential has floating-point buffers"),
        opt.averaged(),
    ):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with opt.averaged():
            pass
        with opt.averaged(net):
            pass


def test_averaged_says_nothing_where_there_is_nothing_to_say() -> None:
    class Rotary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", torch.ones(3), persistent=False)
            self.register_buffer("mask", torch.ones(3) > 0)

    net, other = nn.Sequential(nn.Linear(3, 4), Rotary()), nn.BatchNorm1d(4)
    normed = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    given = fusedfog.SGD(normed.parameters(), lr=0.1, model=normed)
    opt = fusedfog.SGD(net.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with opt.averaged(), given.averaged():
            assert other.running_mean is not None
