"""Bad input: a specific error with the way out, before anything is sent or changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fusedfog
from fusedfog import topology


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3))]


@pytest.mark.parametrize(
    ("given_params", "message"),
    [
        ([], "empty parameter list"),
        ([nn.Parameter(torch.zeros(3).to_sparse())], "sparse"),
        ([nn.Parameter(torch.zeros(3, dtype=torch.complex64))], "complex64.*supported are"),
        ([nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False)], "int32"),
        ([nn.Parameter(torch.zeros(3, device="meta"))], "materialise"),
        ([nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3, device="meta"))], "meta"),
    ],
)
def test_parameters(given_params: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fusedfog.SGD(given_params, lr=0.1)


@pytest.mark.parametrize(
    ("kind", "keywords", "message"),
    [
        ("SGD", {"lr": -1.0}, "lr must be finite and not negative"),
        ("SGD", {"lr": float("nan")}, "lr must be finite"),
        ("SGD", {"lr": 0.1, "momentum": float("inf")}, "momentum must be finite"),
        ("SGD", {"lr": 0.1, "momentum": -0.1}, "momentum"),
        ("SGD", {"lr": 0.1, "weight_decay": -0.1}, "weight_decay"),
        ("SGD", {"lr": 0.1, "nesterov": True}, "Nesterov momentum requires"),
        ("SGD", {"lr": 0.1, "nesterov": True, "momentum": 0.9, "dampening": 0.1}, "Nesterov momentum requires"),
        ("AdamW", {"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\)"),
        ("AdamW", {"betas": (float("nan"), 0.9)}, "betas"),
        ("Adam", {"eps": float("nan")}, "eps"),
        ("AdamW", {"bucket_mb": 0}, "bucket_mb must be positive"),
        ("AdamW", {"bucket_mb": float("inf")}, "bucket_mb must be positive and finite"),
        ("AdamW", {"communicate_every": 0}, "communicate_every must be a whole number"),
        ("AdamW", {"communicate_every": 1.5}, "communicate_every must be a whole number"),
        ("AdamW", {"max_grad_norm": 0.0}, "max_grad_norm"),
        ("AdamW", {"algorithm": "gossip"}, "unknown algorithm 'gossip' for Adam; there are awc"),
        ("AdamW", {"topology": topology.ring(4)}, "is for 4 ranks but the group has 1"),
        ("AdamW", {"topology": "rind"}, "rind"),
    ],
)
def test_keywords(kind: str, keywords: dict[str, Any], message: str) -> None:
    given_params = params()
    home = given_params[0].data_ptr()
    with pytest.raises(ValueError, match=message):
        getattr(fusedfog, kind)(given_params, **keywords)
    assert given_params[0].data_ptr() == home


@given(st.sampled_from(["lr", "eps", "weight_decay"]), st.one_of(st.just(float("nan")), st.floats(max_value=-1e-9)))
def test_no_hyper_parameter_may_be_negative_or_nan(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        fusedfog.AdamW(params(), **{name: value})
    with pytest.raises(ValueError, match=name):
        fusedfog.AdamW([{"params": params(), name: value}])


def test_a_topology_that_is_no_topology() -> None:
    with pytest.raises(TypeError, match="topology must be a"):
        fusedfog.SGD(params(), lr=0.1, topology=3)  # type: ignore[arg-type]


def test_no_process_group_in_a_larger_world(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RuntimeError, match=r"WORLD_SIZE is 4.*fusedfog.init\(\)"):
        fusedfog.SGD(params(), lr=0.1)
    fusedfog.SGD(params(), lr=0.1, algorithm="local").step()


def test_a_bad_group_is_not_added() -> None:
    opt = fusedfog.SGD(params(), lr=0.1)
    with pytest.raises(ValueError, match="lr"):
        opt.add_param_group({"params": params(), "lr": -1.0})
    assert len(opt.param_groups) == 1
    opt.step()


def test_a_sparse_gradient_is_named() -> None:
    layer = nn.Embedding(4, 3, sparse=True)
    opt = fusedfog.SGD(layer.parameters(), lr=0.1, model=layer)
    layer(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match=r"weight has a sparse gradient.*sparse=False"):
        opt.step()


def test_a_checkpoint_of_another_shape_or_algorithm_changes_nothing() -> None:
    small, large = nn.Linear(3, 3), nn.Linear(3, 4)
    opt, other = (fusedfog.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (small, large))
    for net, o in ((small, opt), (large, other)):
        net(torch.ones(1, 3)).sum().backward()
        o.step()
    before = opt.state[small.weight]["momentum_buffer"].clone()
    with pytest.raises(ValueError, match=r"momentum_buffer of parameter 0 has shape \(4, 3\), not \(3, 3\)"):
        opt.load_state_dict(other.state_dict())
    assert torch.equal(opt.state[small.weight]["momentum_buffer"], before)
    foreign = opt.state_dict()
    foreign["fusedfog"]["algorithm"] = "atc"
    with pytest.raises(ValueError, match="algorithm='atc'"):
        opt.load_state_dict(foreign)
