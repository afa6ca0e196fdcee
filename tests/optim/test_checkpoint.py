"""Checkpoints of all ranks: bit for bit on as many new processes, the mean on another number of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.pool import Pool
from torch import nn

import fusedfog
from fusedfog.algorithms import TABLE

TINY = 2e-4
KINDS = {"SGD": "SGD", "Adam": "AdamW", "AccumAdam": "AccumAdamW"}
QUICK = [("AdamW", "awc"), ("SGD", "push_sum"), ("SGD", "exact_diffusion"), ("AdamW", "gradient_tracking")]
EVERY = [
    pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
    for case in [(KINDS[family], name) for family, rows in TABLE.items() for name in rows]
]


@pytest.fixture(scope="module")
def others() -> Iterator[Pool]:
    """Processes that have seen nothing of a run that is resumed in them."""
    pool = Pool()
    yield pool
    pool.close()


def make(kind: str, algorithm: str, **keywords: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3)).double()
    options: dict[str, Any] = {"bucket_mb": TINY, "lr": 0.02, **keywords}
    if kind == "SGD" and algorithm != "gradient_tracking":
        options["momentum"] = 0.9
    if algorithm in ("awc", "push_sum"):
        options |= {"communicate_every": 2, "topology": "one_peer_exponential"}
    return model, getattr(fusedfog, kind)(model.parameters(), algorithm=algorithm, **options)


def train(model: nn.Module, opt: Any, first: int, last: int) -> None:
    for step in range(first, last):
        torch.manual_seed(1000 * step + dist.get_rank())
        for group in opt.param_groups:
            group["lr"] = 0.02 / (1 + step // 7)
        opt.zero_grad()
        model(torch.randn(8, 5, dtype=torch.float64)).square().mean().backward()
        opt.step()


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def save_in_between(path: str, kind: str, algorithm: str, fused_backward: bool) -> dict[str, torch.Tensor]:
    model, opt = make(kind, algorithm, fused_backward=fused_backward)
    train(model, opt, 0, 20)
    fusedfog.save_checkpoint(path, model, opt, step=20, note=f"rank {dist.get_rank()}")
    train(model, opt, 20, 40)
    opt.drain()
    return values(model)


def resume(path: str, kind: str, algorithm: str, fused_backward: bool) -> dict[str, torch.Tensor]:
    model, opt = make(kind, algorithm, fused_backward=fused_backward)
    extra = fusedfog.load_checkpoint(path, model, opt)
    assert extra == {"step": 20, "note": f"rank {dist.get_rank()}"}
    train(model, opt, 20, 40)
    opt.drain()
    return values(model)


@pytest.mark.parametrize(("kind", "algorithm"), EVERY)
def test_twenty_steps_more_in_new_processes_equal_forty(
    ranks: Pool, others: Pool, tmp_path: Path, kind: str, algorithm: str
) -> None:
    fused_backward = algorithm in ("atc", "awc", "momentum_tracking")
    whole = ranks.run(4, save_in_between, str(tmp_path), kind, algorithm, fused_backward)
    again = others.run(4, resume, str(tmp_path), kind, algorithm, fused_backward)
    for one, other in zip(whole, again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def save(path: str, kind: str, algorithm: str) -> tuple[dict[str, torch.Tensor], dict[Any, Any], list[float] | None]:
    model, opt = make(kind, algorithm)
    train(model, opt, 0, 6)
    fusedfog.save_checkpoint(path, model, opt)
    saved = copy.deepcopy(opt.state_dict())
    return values(model), saved["state"], saved["fusedfog"]["push_sum"]


def load(path: str, kind: str, algorithm: str) -> tuple[dict[str, torch.Tensor], dict[Any, Any], int]:
    model, opt = make(kind, algorithm)
    fusedfog.load_checkpoint(path, model, opt)
    saved, loaded = copy.deepcopy(opt.state_dict()), values(model)
    train(model, opt, 6, 8)
    opt.drain()
    return loaded, saved["state"], saved["fusedfog"]["steps"]


@pytest.mark.parametrize("n", [1, 2, 8])
@pytest.mark.parametrize(("kind", "algorithm"), [("AdamW", "awc"), ("SGD", "push_sum"), ("SGD", "momentum_tracking")])
def test_another_number_of_ranks_starts_from_the_mean(
    ranks: Pool, tmp_path: Path, n: int, kind: str, algorithm: str
) -> None:
    saved = ranks.run(4, save, str(tmp_path), kind, algorithm)
    weights = torch.tensor(saved[0][2] or [1.0] * 4, dtype=torch.float64)
    assert algorithm != "push_sum" or weights.std() > 0 or saved[0][2] is not None

    def mean(parts: list[torch.Tensor]) -> torch.Tensor:
        return (torch.stack(parts) * (weights / weights.sum()).view(-1, *[1] * parts[0].ndim)).sum(0)

    for model, states, steps in ranks.run(n, load, str(tmp_path), kind, algorithm):
        assert steps == 6
        for name, value in model.items():
            parts = [rank[0][name] for rank in saved]
            expected = mean(parts) if value.is_floating_point() else parts[0]
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
        if n > 1 or algorithm != "momentum_tracking":
            for key, state in states.items():
                for name, value in state.items():
                    parts = [rank[1][key][name].double() for rank in saved]
                    torch.testing.assert_close(value.double(), mean(parts), rtol=1e-12, atol=1e-14)


def load_other(path: str, width: int, algorithm: str) -> None:
    model = nn.Sequential(nn.Linear(5, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 3)).double()
    before = values(model)
    opt = fusedfog.SGD(model.parameters(), lr=0.1, momentum=0.9, algorithm=algorithm, sync_init=False)
    try:
        fusedfog.load_checkpoint(path, model, opt)
    finally:
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("width", "algorithm", "message"),
    [(9, "atc", "was saved by algorithm 'awc'"), (8, "awc", "is a checkpoint of another model")],
)
def test_a_checkpoint_of_something_else_changes_nothing(
    ranks: Pool, tmp_path: Path, width: int, algorithm: str, message: str
) -> None:
    ranks.run(2, save, str(tmp_path), "SGD", "awc")
    for outcome in ranks.outcomes(2, load_other, str(tmp_path), width, algorithm):
        assert outcome.error_type == "ValueError" and message in outcome.message


class Counting(nn.Module):
    """A module that keeps something beside tensors."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.weight, self.seen = nn.Parameter(torch.full((3,), scale)), {"names": [scale], "mask": torch.ones(2)}

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


class Plain(torch.optim.Optimizer):
    """States that are numbers, and tensors inside of others."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": torch.tensor(0.5), "names": ("a", None)})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                state["history"] = [*state.get("history", []), p.detach().clone()]
                p.data.add_(p.grad, alpha=-float(group["lr"]))


def what_is_no_tensor(path: str) -> None:
    rank = dist.get_rank()
    (model, opt), (other, loaded) = (
        (one, fusedfog.Decentralized(Plain(one.parameters()), topology="ring", algorithm="atc", sync_init=False))
        for one in (Counting(1.0 + rank), Counting(5.0))
    )
    for _ in range(2):
        model.weight.grad = torch.ones(3)
        opt.step()
    fusedfog.save_checkpoint(path, model, opt)
    fusedfog.load_checkpoint(path, other, loaded)
    assert torch.equal(other.weight, model.weight) and other.seen["names"] == [1.0 + rank]
    assert torch.equal(other.seen["mask"], torch.ones(2))
    ours, theirs = opt.state[model.weight], loaded.state[other.weight]
    assert theirs["count"] == 2 and len(theirs["history"]) == 2
    assert all(map(torch.equal, ours["history"], theirs["history"]))
    group = loaded.param_groups[0]
    assert torch.equal(group["lr"], torch.tensor(0.5)) and group["names"] == ("a", None)
    plain = nn.Module()
    plain.weight = nn.Parameter(torch.zeros(3))
    without = fusedfog.Decentralized(Plain(plain.parameters()), topology="ring", algorithm="atc")
    with pytest.raises(ValueError, match="_extra_state has shape"):
        fusedfog.load_checkpoint(path, plain, without)


def test_what_is_no_tensor_comes_back_too(ranks: Pool, tmp_path: Path) -> None:
    ranks.run(2, what_is_no_tensor, str(tmp_path))
