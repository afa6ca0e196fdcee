"""`inside="gradients"`: a machine is data-parallel, and one node of the graph with its ranks' batches together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fusedfog
from fusedfog.comm import shared_memory

DOUBLE = torch.float64


def net(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3)).to(dtype)


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(100 * step + rank))


def build(params: Any, kind: str, **keywords: Any) -> Any:
    if kind == "Decentralized":
        return fusedfog.Decentralized(torch.optim.AdamW(params, lr=0.02), **keywords)
    return getattr(fusedfog, kind)(params, lr=0.05 if kind == "SGD" else 0.02, **keywords)


def train(model: nn.Module, opt: Any, steps: range, part: list[int], micro: bool = False) -> None:
    """Steps on the batches of ranks `part` together, or one by one."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        opt.zero_grad()
        if micro:
            for rank in part[:-1]:
                with opt.no_sync():
                    (model(batch(step, rank).to(dtype)).square().mean() / len(part)).backward()
            (model(batch(step, part[-1]).to(dtype)).square().mean() / len(part)).backward()
        else:
            model(torch.cat([batch(step, rank) for rank in part]).to(dtype)).square().mean().backward()
        opt.step()


def values(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def dtype_of(keywords: dict[str, Any]) -> torch.dtype:
    """dag divides differences of parameters by lr, and with them their rounding; codes round it up to one of theirs."""
    precise = keywords.get("algorithm") == "dag" or "wire_dtype" in keywords
    return torch.bfloat16 if "low_precision" in keywords else DOUBLE if precise else torch.float32


def mesh_of(places: list[list[int]]) -> DeviceMesh:
    return DeviceMesh("cpu", places)


def on_machines(kind: str, keywords: dict[str, Any], steps: int, micro: bool, shares: bool = True) -> list[Tensor]:
    """Parameters of this rank, of six on three machines, whose ranks share memory or not."""
    model, found = net(dtype_of(keywords)), shared_memory.SUPPORTED
    shared_memory.SUPPORTED = found and shares
    try:
        return _on_machines(model, kind, keywords, steps, micro)
    finally:
        shared_memory.SUPPORTED = found


def _on_machines(model: nn.Module, kind: str, keywords: dict[str, Any], steps: int, micro: bool) -> list[Tensor]:
    opt = build(model.parameters(), kind, mesh=mesh_of([[0, 3], [1, 4], [5, 2]]), bucket_mb=1e-4, **keywords)
    rank = dist.get_rank()
    train(model, opt, range(steps), [2 * rank, 2 * rank + 1] if micro else [rank], micro)
    return values(model)


def on_nodes(kind: str, keywords: dict[str, Any], steps: int, machines: list[list[int]], micro: bool) -> list[Tensor]:
    """Parameters of this rank, of three with the batches of one machine each."""
    model = net(dtype_of(keywords))
    opt = build(model.parameters(), kind, **keywords)
    part = machines[dist.get_rank()]
    train(model, opt, range(steps), [b for r in part for b in (2 * r, 2 * r + 1)] if micro else part)
    return values(model)


SETUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD awc": ("SGD", {"momentum": 0.9, "topology": "ring"}),
    "SGD atc": ("SGD", {"momentum": 0.9, "algorithm": "atc"}),
    "decentlam": ("SGD", {"momentum": 0.9, "algorithm": "decentlam", "topology": "ring"}),
    "gradient_tracking": ("SGD", {"algorithm": "gradient_tracking", "topology": "ring"}),
    "AdamW awc": ("AdamW", {}),
    "AdamW hooks": ("AdamW", {"fused_backward": True, "algorithm": "atc", "topology": "ring"}),
    "AdamW every": ("AdamW", {"communicate_every": 2, "global_average_every": 5}),
    "AdamW clipped": ("AdamW", {"max_grad_norm": 0.05}),
    "SGD start": ("SGD", {"momentum": 0.9, "data_parallel_steps": 4}),
    "dag": ("AdamW", {"algorithm": "dag", "topology": "ring"}),
    "Decentralized": ("Decentralized", {"topology": "ring"}),
    "int8": ("AdamW", {"wire_dtype": "int8"}),
    "fp8 hooks": ("SGD", {"wire_dtype": "fp8", "fused_backward": True, "algorithm": "atc", "topology": "ring"}),
    "bf16 start": ("SGD", {"wire_dtype": "bf16", "topology": "base_graph", "data_parallel_steps": 4, "momentum": 0.9}),
    "int8 tracking": ("SGD", {"wire_dtype": "int8", "algorithm": "gradient_tracking", "topology": "ring"}),
}
BY_MESSAGES = ("AdamW awc", "int8", "bf16 start")
NODES = [[0, 3], [1, 4], [5, 2]]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "micro", "shares"),
    [
        *((name, False, True) for name in SETUPS),
        *((name, False, False) for name in BY_MESSAGES),
        ("AdamW awc", True, True),
        ("AdamW hooks", True, True),
    ],
)
def test_a_machine_is_a_node_with_as_many_times_the_batch(ranks: Pool, name: str, micro: bool, shares: bool) -> None:
    kind, keywords = SETUPS[name]
    steps = 6 if name == "dag" else 12  # dag blows up rounding a thousandfold in a few steps, whatever it trains on.
    found = ranks.run(6, on_machines, kind, keywords, steps, micro, shares)
    nodes = ranks.run(3, on_nodes, kind, keywords, steps, NODES, micro)
    for machine, members in enumerate(NODES):
        for one, other, node in zip(*(found[rank] for rank in members), nodes[machine], strict=True):
            assert torch.equal(one, other)
            torch.testing.assert_close(one, node, rtol=2e-5, atol=2e-6)
    assert not torch.equal(found[0][0], found[1][0])


LONG: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD awc": SETUPS["SGD awc"],
    "AdamW start": ("AdamW", {"data_parallel_steps": 40}),
    "stochastic": ("AdamW", {"low_precision": "stochastic", "state_dtype": torch.bfloat16}),
    "kahan": ("SGD", {"low_precision": "kahan", "momentum": 0.9, "algorithm": "atc", "topology": "ring"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_parameters_are_equal_inside_machines_over_200_steps(ranks: Pool, name: str) -> None:
    found = ranks.run(6, on_machines, *LONG[name], 200, False)
    for members in NODES:
        assert all(torch.equal(a, b) for a, b in zip(*(found[rank] for rank in members), strict=True))


def drifts(way: str) -> str:
    """The error that follows when rank 2, of four on two machines, does not step like its machine."""
    mesh = init_device_mesh("cpu", (2, 2))
    torch.manual_seed(dist.get_rank() if way == "from the start" else 0)
    model = nn.Linear(4, 3)
    opt = fusedfog.SGD(model.parameters(), lr=0.01, mesh=mesh, topology="ring", sync_init=way != "from the start")
    try:
        for step in range(140):
            opt.zero_grad()
            model(torch.ones(2, 4)).square().mean().backward()
            opt.step()
            if way == "another rate" and step == 70 and dist.get_rank() == 2:
                opt.param_groups[0]["lr"] *= 2
    except fusedfog.DivergedError as error:
        return str(error)
    return ""


def test_a_rank_that_drifts_from_its_machine_is_an_error_with_its_name(ranks: Pool) -> None:
    found = ranks.run(4, drifts, "another rate", pg_timeout=20)
    assert all("ranks 2, 3 average gradients" in text for text in found)
    for rank in (2, 3):
        assert found[rank].startswith(f"rank {rank}: ranks 2, 3 average gradients") and "step 129" in found[rank]


def test_machines_that_start_apart_inside_are_told_at_once(ranks: Pool) -> None:
    for rank, text in enumerate(ranks.run(4, drifts, "from the start", pg_timeout=20)):
        assert text.startswith(f"rank {rank}: ranks {'0, 1' if rank < 2 else '2, 3'} average") and "step 1)" in text


def resumed(form: str | None) -> bool:
    mesh = init_device_mesh("cpu", (2, 2))
    one, other = net(), net()
    keywords = {"mesh": mesh, "data_parallel_steps": 3, "topology": "ring", "wire_dtype": form}
    opt = fusedfog.AdamW(one.parameters(), lr=0.02, **keywords)
    train(one, opt, range(5), [dist.get_rank()])
    saved, weights = opt.state_dict(), values(one)
    saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, saved)
    train(one, opt, range(5, 9), [dist.get_rank()])
    again = fusedfog.AdamW(other.parameters(), lr=0.02, **keywords)
    with again.paused(), torch.no_grad():
        for p, value in zip(other.parameters(), weights, strict=True):
            p.copy_(value)
    again.load_state_dict(saved)
    train(other, again, range(5, 9), [dist.get_rank()])
    return all(torch.equal(a, b) for a, b in zip(values(one), values(other), strict=True))


@pytest.mark.parametrize("form", [None, "int8"])
def test_a_resume_is_the_uninterrupted_run(ranks: Pool, form: str | None) -> None:
    assert ranks.run(4, resumed, form) == [True] * 4


def compressed_bytes(form: str | None) -> tuple[int, int]:
    """Sent across machines and inside them, by this rank, in four exchanges of 64 x 64 parameters."""
    model = nn.Linear(64, 64, bias=False)
    opt = fusedfog.SGD(
        model.parameters(), lr=0.0, mesh=init_device_mesh("cpu", (2, 2)), topology="ring", wire_dtype=form
    )
    for _ in range(3):
        model.weight.grad = torch.ones_like(model.weight)
        opt.step()
    opt.drain()
    stats = opt.stats()
    return stats["bytes_across"], stats["bytes_sent"] - stats["bytes_across"]


def test_codes_travel_across_machines_and_inside(ranks: Pool) -> None:
    codes, gradients = 64 * 64 * 17 // 16, 3 * 64 * 64 * 4
    for across, inside in ranks.run(4, compressed_bytes, "int8"):
        assert across == 4 * codes // 2  # One of them is on its way to a step that never comes.
        assert gradients + 4 * codes // 2 <= inside < 1.01 * gradients + 4 * codes // 2


def compressed_parameters() -> None:
    mesh = init_device_mesh("cpu", (2, 1))
    fusedfog.SGD(net().parameters(), lr=0.1, mesh=mesh, inside="parameters", wire_dtype="int8")


def test_means_of_parameters_are_not_compressed(ranks: Pool) -> None:
    for outcome in ranks.outcomes(2, compressed_parameters):
        assert outcome.error_type == "ValueError" and "use inside='gradients', the default" in outcome.message


def test_what_machines_average_is_one_of_two_things() -> None:
    with pytest.raises(ValueError, match=r"inside is 'gradients' or 'parameters'.*did you mean"):
        fusedfog.SGD(net().parameters(), lr=0.1, inside="gradient")
