"""What is not finite, in passes on the CPU: batches leave out what the reference leaves out, and raise the alarm."""

from __future__ import annotations

import math

import pytest
import torch
from support.kernel_rules import ROWS
from support.passes import make_pass

from fusedfog.kernels import Gradients, Region, cpu_pass, torch_pass

NUMELS = (3, 64, 200, cpu_pass.WIDTH + 70)


def run(maker, name, neighbours, bad, alarm, compiled=False):
    random = torch.Generator().manual_seed(0)
    starts = [0]
    for numel in NUMELS:
        starts.append(starts[-1] + -(-numel // 64) * 64)
    size, spans = starts[-1], tuple(zip(starts[:-1], NUMELS, strict=True))
    x, *inbox = (torch.rand(size, generator=random) for _ in range(1 + neighbours))
    states = tuple(torch.rand(size, generator=random) for _ in range(ROWS[name].states))
    gradients = [torch.rand(numel, generator=random) for numel in NUMELS]
    for place in (1, starts[1] + 63, starts[3] + cpu_pass.WIDTH + 65):
        if bad == "neighbour":
            inbox[-1][place] = math.nan
            inbox[0][place + 1] = -math.inf
        if bad == "own":
            x[place] = math.inf
    maker(
        make_pass(
            ROWS[name].rule,
            x,
            states,
            ROWS[name].hyper,
            Region(0, spans, None, compiled),
            grads=Gradients(gradients, None, torch.float32) if ROWS[name].grads else None,
            steps=torch.ones(len(NUMELS)),
            inbox=(tuple(inbox),),
            weights=(0.25,) * neighbours,
            alarm=alarm,
        )
    )
    return torch.cat([x[start : start + numel] for start, numel in spans])


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("name", ["mix", "sgd", "sgd-momentum-all", "adamw", "adam-coupled-maximize"])
def test_batches_leave_out_what_the_reference_leaves_out(name, neighbours):
    for bad in ("neighbour", "own", "nothing"):
        alarms = torch.zeros(2, 4)
        ours, theirs = (
            run(maker, name, neighbours, bad, alarm)
            for maker, alarm in zip((cpu_pass.run_pass, torch_pass.run_pass), alarms, strict=True)
        )
        # An infinity of its own may become NaN in one of them.
        torch.testing.assert_close(ours.nan_to_num(9, 9, 9), theirs.nan_to_num(9, 9, 9), rtol=1e-5, atol=1e-6)
        assert int((~ours.isfinite()).sum()) == 3 * (bad == "own")
        raised, expected = alarms.any(1).tolist()
        assert expected == (bad != "nothing")
        # Own values, which taint nobody else, batches do not look for.
        assert raised == expected or bad == "own"


@pytest.mark.parametrize("neighbours", [1, 3])
@pytest.mark.parametrize("name", ["mix", "sgd", "sgd-momentum-all", "adamw", "adam-coupled-maximize"])
def test_compiled_loops_leave_out_and_raise_the_alarm_as_the_reference(monkeypatch, name, neighbours):
    monkeypatch.setattr(cpu_pass.compiled, "SMALLEST", 1)
    for bad in ("neighbour", "own", "nothing"):
        alarms = torch.zeros(2, 4)
        ours = run(cpu_pass.run_pass, name, neighbours, bad, alarms[0], compiled=True)
        theirs = run(torch_pass.run_pass, name, neighbours, bad, alarms[1])
        torch.testing.assert_close(ours.nan_to_num(9, 9, 9), theirs.nan_to_num(9, 9, 9), rtol=1e-5, atol=1e-6)
        assert int((~ours.isfinite()).sum()) == 3 * (bad == "own")
        assert torch.equal(*alarms) and bool(alarms.any()) == (bad != "nothing")


@pytest.mark.parametrize("compiled", [False, True])
def test_without_an_alarm_they_spread(monkeypatch, compiled):
    monkeypatch.setattr(cpu_pass.compiled, "SMALLEST", 1)
    for maker in (cpu_pass.run_pass, torch_pass.run_pass):
        assert int((~run(maker, "adamw", 1, "neighbour", None, compiled).isfinite()).sum()) == 6
