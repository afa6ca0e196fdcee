"""Gradients that aren't finite leave the same NaNs in parameters and states as they do under torch's optimizers."""

from __future__ import annotations

import math

import pytest
import torch
from support.passes import make_pass

from fusedfog.kernels import Gradients, Region, adam_hyper, cpu_pass, torch_pass

# Shorter than a vector of torch's loops, some vectors, and some with a rest.
NUMELS = (5, 64, 67)


@pytest.mark.parametrize("run", [cpu_pass.run_pass, torch_pass.run_pass], ids=["batches", "reference"])
@pytest.mark.parametrize("numel", NUMELS)
@pytest.mark.parametrize("where", ["gradient", "parameter", "exp_avg", "max_exp_avg_sq"])
def test_amsgrad_keeps_nans_where_torch_does(where, numel, run):
    param = torch.nn.Parameter(torch.ones(numel))
    optimizer = torch.optim.AdamW([param], lr=0.1, amsgrad=True, foreach=False)
    param.grad = torch.ones(numel)
    optimizer.step()
    state = optimizer.state[param]
    named = {"gradient": param.grad, "parameter": param.data, **state}
    named[where][::2] = math.nan
    x, states = param.detach().clone(), [state[name].clone() for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")]
    grads, region = Gradients([param.grad.clone()], None, torch.float32), Region(0, ((0, numel),), None)
    optimizer.step()
    run(make_pass("adam", x, states, adam_hyper(optimizer.param_groups[0]), region, grads=grads, steps=torch.ones(1)))
    ours, theirs = (x, *states), (param, state["exp_avg"], state["exp_avg_sq"], state["max_exp_avg_sq"])
    for got, expected in zip(ours, theirs, strict=True):
        assert torch.equal(got.isnan(), expected.isnan())
