"""Processes of an elastic run are killed, and the others train on: what they reach, by the formula of those that are left."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch
from support.elastic import Members, linger, results_when_one_comes_back, say

import fusedfog
from fusedfog.comm.elastic import watching

SLOTS, SIZE = 4, 5


def numbers(slot: int) -> tuple[np.ndarray, np.ndarray]:
    """A member's own loss is h (x - c)^2 / 2 in each coordinate; here are h and c."""
    return 1.0 + np.arange(SIZE) * (slot + 1) / 8, np.linspace(-1, 1, SIZE) * (slot + 1) + 3 * (slot == 2)


def optimum(slots: list[int]) -> np.ndarray:
    """Where the sum of these members' losses is least."""
    hs, cs = map(np.array, zip(*map(numbers, slots), strict=True))
    return (hs * cs).sum(0) / hs.sum(0)


def rest_of_ring(slots: list[int], lr: float, *, adapt_first: bool) -> np.ndarray:
    """Where members on a ring of three come to rest: X = W X - lr g(X), or X = W (X - lr g(X)). [members, SIZE]."""
    hs, cs = map(np.array, zip(*map(numbers, slots), strict=True))
    n, found = len(slots), np.empty((len(slots), SIZE))
    mixing = np.full((n, n), 1 / 3)
    for k in range(SIZE):
        pull = lr * np.diag(hs[:, k])
        left = np.eye(n) - mixing @ (np.eye(n) - pull) if adapt_first else np.eye(n) - mixing + pull
        found[:, k] = np.linalg.solve(left, (mixing @ pull if adapt_first else pull) @ cs[:, k])
    return found


class Plan:
    """What a process does beside training; plain, as it travels. There is a pause after each step where the victim comes back."""

    def __init__(
        self,
        steps: int,
        *,
        victim: int = -1,
        at: int = -1,
        pause: float = 0.0,
        kind: str = "SGD",
        dtype: torch.dtype = torch.float64,
        **keywords: Any,
    ) -> None:
        self.steps, self.victim, self.at, self.pause = steps, victim, at, pause
        self.kind, self.dtype, self.keywords = kind, dtype, keywords


def own_slot() -> int:
    return int(os.environ["FUSEDFOG_SLOT"])


def build(plan: Plan) -> tuple[torch.nn.Linear, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(SIZE, 1, bias=False).to(plan.dtype)
    keywords = {"lr": 0.05, **plan.keywords}
    if plan.kind == "Decentralized":
        inner = torch.optim.SGD(model.parameters(), lr=keywords.pop("lr"))
        return model, fusedfog.Decentralized(inner, **keywords)
    return model, getattr(fusedfog, plan.kind)(model.parameters(), **keywords)


def one_step(model: torch.nn.Linear, opt: Any) -> None:
    h, c = map(torch.from_numpy, numbers(own_slot()))
    opt.zero_grad()
    (h * (model.weight[0] - c) ** 2).sum().mul(0.5).backward()
    opt.step()


def train(plan: Plan) -> dict[str, Any]:
    changes: list[fusedfog.Change] = []
    fusedfog.init(elastic=True, timeout=60, on_membership_change=changes.append)
    model, opt = build(plan)
    began = opt.steps
    first, calls = os.environ["FUSEDFOG_INCARNATION"] == "0", 0
    while opt.steps < plan.steps:
        if first and opt.steps == plan.at and own_slot() == plan.victim:
            os.kill(os.getpid(), signal.SIGKILL)
        one_step(model, opt)
        calls += 1
        if opt.steps % 10 == 0:
            say(opt.steps)
        time.sleep(plan.pause)
        if plan.pause:
            linger(opt, f"{plan.victim}.1", plan.steps)
    return {
        "x": model.weight.detach()[0].double().numpy(),
        "steps": opt.steps,
        "began": began,
        "changes": changes,
        "stats": opt.stats(),
        "rank": fusedfog.rank(),
        "calls": calls,
        "updates": [int(state["step"]) for state in opt.state.values() if "step" in state],
    }


def train_and_see_who_died(plan: Plan) -> dict[str, Any]:
    """As `train`; a member that is late does not hear that others are ready for the next epoch before it has seen why."""
    watching._GRACE = 60.0
    return train(plan)


def test_three_of_four_train_on_when_one_is_killed() -> None:
    with Members(SLOTS) as members:
        members.start(train_and_see_who_died, Plan(60, victim=2, at=20))
        results = members.results()
    assert list(results) == ["0.0", "1.0", "3.0"]
    for place, result in enumerate(results.values()):
        assert result["steps"] == 60 and result["rank"] == place
        first, second = result["changes"]
        assert first.members == ("0.0", "1.0", "2.0", "3.0") and first.epoch == 0
        assert second.members == ("0.0", "1.0", "3.0") and second.epoch == 1
        assert second.left == ("2.0",) and second.joined == () and second.cause == "slot 2 has ended"
        stats = result["stats"]
        assert (stats["epoch"], stats["members"], stats["reforms"]) == (1, ("0.0", "1.0", "3.0"), 1)
        assert 0 < stats["reform_s"] < 60
    assert len({result["stats"]["exchanges"] for result in results.values()}) == 1


SLOW = pytest.mark.slow
METHODS = [
    pytest.param("SGD", {"algorithm": "awc"}, False),
    pytest.param("SGD", {"algorithm": "atc"}, True, marks=SLOW),
    pytest.param("SGD", {"algorithm": "decentlam", "momentum": 0.5}, True, marks=SLOW),
    pytest.param("SGD", {"algorithm": "quasi_global", "momentum": 0.5}, True, marks=SLOW),
    pytest.param("SGD", {"algorithm": "awc", "wire_dtype": "int8"}, False),
    pytest.param("SGD", {"algorithm": "awc", "wire_dtype": "bf16", "bucket_mb": 1e-5}, False, marks=SLOW),
    pytest.param("SGD", {"algorithm": "atc", "wire_dtype": "fp8"}, True, marks=SLOW),
    pytest.param("SGD", {"algorithm": "push_sum"}, True, marks=SLOW),
    pytest.param("Decentralized", {"algorithm": "awc"}, False, marks=SLOW),
    pytest.param("Decentralized", {"algorithm": "atc"}, True, marks=SLOW),
]
EXACT = [
    pytest.param({"algorithm": "exact_diffusion"}),
    pytest.param({"algorithm": "extra"}, marks=SLOW),
    pytest.param({"algorithm": "gradient_tracking", "lr": 0.05}, marks=SLOW),
    pytest.param({"algorithm": "momentum_tracking", "lr": 0.02, "momentum": 0.5}, marks=SLOW),
    pytest.param({"algorithm": "exact_diffusion", "wire_dtype": "int8"}, marks=SLOW),
    pytest.param({"algorithm": "extra", "wire_dtype": "int8"}, marks=SLOW),
    pytest.param({"algorithm": "gradient_tracking", "lr": 0.05, "wire_dtype": "int8"}, marks=SLOW),
]
LEFT = [0, 1, 3]


@pytest.mark.parametrize(("kind", "keywords", "adapt_first"), METHODS)
def test_survivors_come_to_rest_where_their_own_graph_has_it(
    kind: str, keywords: dict[str, Any], adapt_first: bool
) -> None:
    with Members(SLOTS) as members:
        members.start(train, Plan(400, victim=2, at=20, kind=kind, lr=0.1, topology="ring", **keywords))
        results = members.results()
    found = np.array([result["x"] for result in results.values()])
    np.testing.assert_allclose(found, rest_of_ring(LEFT, 0.1, adapt_first=adapt_first), rtol=0, atol=1e-10)


@pytest.mark.parametrize("keywords", EXACT)
def test_exact_methods_reach_the_optimum_of_those_that_are_left(keywords: dict[str, Any]) -> None:
    with Members(SLOTS) as members:
        members.start(train, Plan(900, victim=2, at=20, **{"lr": 0.1, "topology": "ring", **keywords}))
        results = members.results()
    assert len(results) == 3
    for result in results.values():
        np.testing.assert_allclose(result["x"], optimum(LEFT), rtol=0, atol=1e-10)


def rest_of_push_sum(shares: np.ndarray, slots: list[int], lr: float) -> np.ndarray:
    """Where push-sum's members come to rest, with the scalars w = P w that it has then: w z = P (w z - lr g(z)). [members, SIZE].

    P has rank one too few, so that of all z the one is wanted for which the gradients sum to zero.
    """
    hs, cs = map(np.array, zip(*map(numbers, slots), strict=True))
    n, found = len(slots), np.empty((len(slots), SIZE))
    ones = np.ones((1, n))
    scalars = np.linalg.lstsq(np.vstack([shares - np.eye(n), ones]), np.append(np.zeros(n), n), rcond=None)[0]
    for k in range(SIZE):
        pull = lr * np.diag(hs[:, k])
        held = (np.eye(n) - shares) @ np.diag(scalars) + shares @ pull
        system = np.vstack([held, ones @ pull])
        right = np.append(shares @ pull @ cs[:, k], ones @ pull @ cs[:, k])
        found[:, k] = np.linalg.lstsq(system, right, rcond=None)[0]
    return found


def star_shares(n: int) -> np.ndarray:
    """P of a star around rank 0: the centre splits between all, a leaf between the centre and itself."""
    shares = np.eye(n) / 2
    shares[0, :], shares[:, 0] = 1 / 2, 1 / n
    return shares


def with_newcomer(plan: Plan) -> dict[str, dict[str, Any]]:
    """What all processes return of a run in which the victim is started again."""
    return results_when_one_comes_back(SLOTS, plan.victim, train, plan)


@pytest.mark.slow
@pytest.mark.parametrize("keywords", EXACT)
def test_exact_methods_reach_everybodys_optimum_once_the_killed_one_is_back(keywords: dict[str, Any]) -> None:
    options = {"lr": 0.1, "topology": "ring", **keywords}
    results = with_newcomer(Plan(1500, victim=2, at=20, pause=0.002, **options))
    assert list(results) == ["0.0", "1.0", "3.0", "2.1"]
    began = results["2.1"]["began"]
    assert 20 < began < 1200, "it has not begun anew, nor when all was over"
    for uid, result in results.items():
        assert result["steps"] == 1500
        np.testing.assert_allclose(result["x"], optimum([0, 1, 2, 3]), rtol=0, atol=1e-10)
        last = result["changes"][-1]
        assert last.members == ("0.0", "1.0", "2.1", "3.0") and last.joined == ("2.1",)
        assert result["rank"] == int(uid[0])


def test_push_sum_comes_to_rest_on_the_graph_of_those_that_are_left() -> None:
    with Members(SLOTS) as members:
        members.start(train, Plan(500, victim=2, at=20, lr=0.1, topology="star", algorithm="push_sum"))
        results = members.results()
    found = np.array([result["x"] for result in results.values()])
    np.testing.assert_allclose(found, rest_of_push_sum(star_shares(3), LEFT, 0.1), rtol=0, atol=1e-10)


@SLOW
def test_push_sum_comes_to_rest_on_the_whole_graph_once_the_killed_one_is_back() -> None:
    results = with_newcomer(Plan(1500, victim=2, at=20, pause=0.002, lr=0.1, topology="star", algorithm="push_sum"))
    assert 20 < results["2.1"]["began"] < 1200
    found = np.array([results[uid]["x"] for uid in ("0.0", "1.0", "2.1", "3.0")])
    np.testing.assert_allclose(found, rest_of_push_sum(star_shares(4), [0, 1, 2, 3], 0.1), rtol=0, atol=1e-10)


OTHERS: dict[str, dict[str, Any]] = {
    "AdamW": {"kind": "AdamW"},
    "AdamW dag": {"kind": "AdamW", "algorithm": "dag"},
    "AdamW quasi_global": {"kind": "AdamW", "algorithm": "quasi_global"},
    "AdamW gradient_tracking": {"kind": "AdamW", "algorithm": "gradient_tracking"},
    "AccumAdamW": {"kind": "AccumAdamW", "accum_steps": 2},
    "atc with momentum, clipped": {"algorithm": "atc", "momentum": 0.9, "max_grad_norm": 1.0},
    "seldom, and averages": {"communicate_every": 3, "global_average_every": 7, "measure": True},
    "bf16, master": {"dtype": torch.bfloat16, "low_precision": "master", "kind": "AdamW"},
    "bf16, kahan": {"dtype": torch.bfloat16, "low_precision": "kahan", "momentum": 0.9},
    "bf16, stochastic": {
        "dtype": torch.bfloat16,
        "low_precision": "stochastic",
        "kind": "AdamW",
        "state_dtype": torch.bfloat16,
    },
    "AdamW push_sum": {"kind": "AdamW", "algorithm": "push_sum", "communicate_every": 2},
    "int8 messages of a changing graph": {"wire_dtype": "int8", "topology": "one_peer_exponential"},
    "heals": {"nonfinite": "heal", "mix_strength": 0.5},
    "small buckets": {"bucket_mb": 1e-5, "algorithm": "atc"},
}


@pytest.mark.parametrize("name", [name if name == "AdamW" else pytest.param(name, marks=SLOW) for name in OTHERS])
def test_each_gradient_is_used_once_whatever_the_method(name: str) -> None:
    options = {"lr": 0.01, **OTHERS[name]}
    results = with_newcomer(Plan(400, victim=2, at=20, pause=0.002, **options))
    assert len(results) == 4
    for uid, result in results.items():
        assert result["steps"] == 400 and np.isfinite(result["x"]).all()
        if result["updates"] and uid != "2.1":
            assert result["updates"] == [result["calls"]], "torch counts the updates of a parameter"
    spread = np.array([result["x"] for result in results.values()]).std(0).max()
    assert spread < 0.5, "they have mixed"
