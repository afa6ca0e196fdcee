"""Elastic runs over NCCL's stand-in: whoever is left trains on, and no pass is made of what an abort has left in memory."""

from __future__ import annotations

import os
import signal
import time
from typing import Any, Literal

import numpy as np
import pytest
import torch
from support import elastic_gpu, ordered_backend
from support.elastic import Members, linger, results_when_one_comes_back
from test_elastic import Plan, rest_of_ring, train

import fusedfog
from fusedfog.comm import averaging
from fusedfog.comm.elastic import nccl

PROPAGATE = {"nonfinite": "propagate"}
"""An abort leaves NaN where messages had not come: whoever mixes that shows it."""


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    ordered_backend.build()


def train_on_gpu(plan: Plan, silent: bool) -> dict[str, Any]:
    with elastic_gpu.pretend(silent=silent):
        return train(plan)


@pytest.mark.parametrize("silent", [True, False])
@pytest.mark.parametrize(("algorithm", "adapt_first"), [("awc", False), ("atc", True)])
def test_survivors_come_to_rest_where_their_own_graph_has_it(algorithm: str, adapt_first: bool, silent: bool) -> None:
    options = {"algorithm": algorithm, "topology": "ring", "lr": 0.1, "dtype": torch.float32, **PROPAGATE}
    with Members(4) as members:
        members.start(train_on_gpu, Plan(300, victim=2, at=20, **options), silent)
        results = members.results()
    assert list(results) == ["0.0", "1.0", "3.0"]
    found = np.array([result["x"] for result in results.values()])
    np.testing.assert_allclose(found, rest_of_ring([0, 1, 3], 0.1, adapt_first=adapt_first), rtol=0, atol=5e-6)


Ending = Literal["step", "leave", "averaging", "connecting"]
"""How a member ends: as it begins a step, by `opt.leave()`, at the next sum over all, or as the next epoch connects."""


class Net(torch.nn.Module):
    """Of several buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(20, 20) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def end(how: Ending, opt: Any) -> None:
    if how == "connecting":
        nccl.connect = kill_self
    elif how == "averaging":
        averaging.dist.all_reduce = kill_self
    elif how == "leave":
        opt.leave()
    else:
        kill_self()


def kill_self(*args: Any, **keywords: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_net(algorithm: str, endings: dict[int, tuple[int, Ending]], steps: int, pause: float) -> dict[str, Any]:
    """AdamW on a member's own data; first processes of the slots in `endings` end at these steps."""
    with elastic_gpu.pretend(silent=True):
        changes: list[fusedfog.Change] = []
        fusedfog.init(elastic=True, timeout=60, dead_after=20.0, on_membership_change=changes.append)
        slot, first = int(os.environ["FUSEDFOG_SLOT"]), os.environ["FUSEDFOG_INCARNATION"] == "0"
        torch.manual_seed(0)
        net = Net()
        options = {"algorithm": algorithm, "bucket_mb": 2e-3, "topology": "ring", **PROPAGATE}
        opt = fusedfog.AdamW(net.parameters(), lr=1e-3, **options)
        buckets, began = len(opt._engine.buckets.all), opt.steps
        data = torch.randn(8, 20, generator=torch.Generator().manual_seed(slot))
        calls, longest, means = 0, 0.0, []
        while opt.steps < steps:
            at, how = endings.get(slot, (-1, "step"))
            if first and at == opt.steps:
                end(how, opt)
                if how == "leave":
                    return {}
            opt.zero_grad()
            (net(data) - data).square().mean().backward()
            begin = time.monotonic()
            opt.step()
            calls, longest = calls + 1, max(longest, time.monotonic() - begin)
            if opt.steps % 20 == 0:
                means.append(fusedfog.mean(float(slot)))
                opt.consensus_distance()
            time.sleep(pause)
            if pause:
                linger(opt, "1.1", steps)
        with opt.averaged():
            mean = torch.cat([p.detach().flatten() for p in net.parameters()]).numpy().copy()
        return {
            "mean": mean,
            "distance": opt.consensus_distance(),
            "updates": {int(state["step"]) for state in opt.state.values()},
            "calls": calls,
            "began": began,
            "buckets": buckets,
            "longest": longest,
            "slots": means[-1],
            "left": {uid for change in changes for uid in change.left},
        }


def check_net(results: dict[str, dict[str, Any]], slots: list[int], left: set[str]) -> None:
    """What holds of those that are left, or have come, whatever happened."""
    assert {int(uid[0]) for uid in results} == set(slots)
    for result in results.values():
        assert result["buckets"] == 3
        assert np.isfinite(result["mean"]).all() and result["distance"] < 1.0
        if result["began"] == 0:
            assert result["updates"] == {result["calls"]}, "each gradient is used once"
            assert result["left"] <= left  # Nobody is told of an epoch that has not come to be.
        assert result["longest"] < 20, "nobody waits for the timeout"
        assert result["slots"] == pytest.approx(np.mean(slots)), "they average over those that there are"
        np.testing.assert_array_equal(result["mean"], next(iter(results.values()))["mean"])


ENDINGS: dict[str, dict[int, tuple[int, Ending]]] = {
    "two at different steps": {1: (12, "step"), 4: (13, "step")},
    "two at once": {1: (12, "step"), 4: (12, "step")},
    "one of all, and one as the next epoch connects": {1: (12, "step"), 4: (11, "connecting")},
    "one leaves": {1: (12, "leave")},
    "one of all, and one as the next epoch has connected": {1: (12, "step"), 4: (11, "averaging")},
    "one in a call": {4: (19, "averaging")},
}


@pytest.mark.parametrize("algorithm", ["atc", pytest.param("awc", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ENDINGS)
def test_whatever_ends_the_others_go_on_and_each_gradient_is_used_once(name: str, algorithm: str) -> None:
    endings = ENDINGS[name]
    with Members(5) as members:
        members.start(train_net, algorithm, endings, 60, 0.0)
        results = {uid: result for uid, result in members.results().items() if result}
    check_net(results, [slot for slot in range(5) if slot not in endings], {f"{slot}.0" for slot in endings})


def test_one_that_comes_back_takes_values_and_moments_by_way_of_the_host() -> None:
    results = results_when_one_comes_back(3, 1, train_net, "atc", {1: (15, "step")}, 250, 0.01)
    assert 15 <= results["1.1"]["began"] < 250
    assert results["1.1"]["updates"] != {results["1.1"]["calls"]}, "it goes on with the counts of the others"
    check_net(results, [0, 1, 2], {"1.0"})


METHODS: dict[str, dict[str, Any]] = {
    "int8": {"wire_dtype": "int8", "topology": "ring"},
    "push_sum": {"algorithm": "push_sum"},
    "averages": {"communicate_every": 3, "global_average_every": 7, "measure": True},
    "changing graph": {"topology": "one_peer_exponential", "kind": "AdamW"},
    "tracking": {"algorithm": "gradient_tracking", "topology": "ring"},
    "wrapped": {"kind": "Decentralized"},
    "heals": {"nonfinite": "heal", "kind": "AdamW"},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_other_methods_go_on_with_one_that_comes_back(name: str) -> None:
    plan = Plan(300, victim=2, at=20, pause=0.01, dtype=torch.float32, **{"lr": 0.01, **METHODS[name]})
    results = results_when_one_comes_back(4, 2, train_on_gpu, plan, True)
    assert len(results) == 4
    for result in results.values():
        assert result["steps"] == 300 and np.isfinite(result["x"]).all()
        assert result["stats"]["refused"] == 0, "nothing that is not finite has come"
        if result["updates"] and result["began"] == 0:
            assert result["updates"] == [result["calls"]]
