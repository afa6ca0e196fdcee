"""What users do wrong, one function for each, and what they are told: the rows of the docs' table "What happens if".

`ALONE` has what one process can do; what takes several ranks is in `support.misuse_of_ranks`. The names of rows are the first
column of the table.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import fusedfog
from fusedfog.comm import group as places

ALONE: dict[str, Callable[[], str]] = {}


def said(call: Callable[[], object]) -> str:
    """What a call says: its error, or else its first warning, as "ValueError: text"; "" if it says nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    found = [one for one in caught if issubclass(one.category, (UserWarning, RuntimeWarning))]
    return f"{found[0].category.__name__}: {found[0].message}" if found else ""


def misuse(row: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """One process does this."""

    def keep(function: Callable[[], object]) -> Callable[[], object]:
        ALONE[row] = lambda: said(function)
        return function

    return keep


# -- starting --------------------------------------------------------------------------------------------------------


VARIABLES = re.compile(r"(RANK|WORLD_SIZE|LOCAL_|GROUP_|MASTER_|TORCHELASTIC|OMPI|PMI|MPI|PALS|MV2|SLURM)")


@contextlib.contextmanager
def started(**variables: str) -> Iterator[None]:
    """A process that a launcher with these variables started, and that was warned of nothing yet."""
    before, warned = dict(os.environ), places._Warned.alone
    for name in [name for name in os.environ if VARIABLES.match(name)]:
        del os.environ[name]
    os.environ.update(variables)
    places._Warned.alone = False
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        places._Warned.alone = warned


def build_one() -> object:
    return fusedfog.AdamW(nn.Linear(3, 2).parameters())


SRUN = {"SLURM_JOB_ID": "812", "SLURM_NTASKS": "4", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "0"}


@misuse("`torchrun` starts the script, and nobody calls `init()`")
def without_init() -> None:
    with started(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1"):
        build_one()


@misuse("the same with `srun`, `mpirun` or `mpiexec`")
def without_init_by_srun() -> None:
    with started(**SRUN, SLURM_STEP_NUM_TASKS="4", SLURM_NODEID="0"):
        build_one()


@misuse("a batch script of Slurm calls `python` without `srun`")
def in_a_batch_script() -> None:
    with started(SLURM_JOB_ID="812", SLURM_NTASKS="4", SLURM_PROCID="0", SLURM_LOCALID="0"):
        build_one()


@misuse("`WORLD_SIZE` is set and `RANK` is not")
def without_rank() -> None:
    with started(WORLD_SIZE="4"):
        fusedfog.init()


@misuse("`RANK` counts from 1")
def counted_from_one() -> None:
    with started(RANK="4", WORLD_SIZE="4"):
        fusedfog.init()


# -- building an optimizer -------------------------------------------------------------------------------------------


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 3))


@misuse("misspell a keyword")
def misspelt_keyword() -> None:
    fusedfog.SGD(net().parameters(), lr=0.1, topologgy="ring")  # type: ignore[call-arg]


@misuse("misspell a value")
def misspelt_value() -> None:
    fusedfog.SGD(net().parameters(), lr=0.1, topology="exponentail")


@misuse("give a rank `weight=0`")
def weightless() -> None:
    fusedfog.SGD(net().parameters(), lr=0.1, weight=0)


@misuse("give `mix_strength=` a number above 1")
def too_strong() -> None:
    fusedfog.SGD(net().parameters(), lr=0.1, mix_strength=1.5)


@misuse("give the module, not its parameters")
def a_module() -> None:
    fusedfog.SGD(net(), lr=0.1)  # type: ignore[arg-type]


@misuse("give a param group a key that nobody reads")
def unknown_key() -> None:
    fusedfog.SGD([{"params": net().parameters(), "learning_rate": 0.1}], lr=0.1)


@misuse("`differentiable=True`")
def differentiable() -> None:
    fusedfog.AdamW(net().parameters(), differentiable=True)


@misuse("give a parameter that is made of other tensors (quantized, `TwoTensor`)")
def made_of_others() -> None:
    pair = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)))
    fusedfog.SGD([("pair", pair)], lr=0.1)


@misuse("list a parameter twice")
def listed_twice() -> None:
    p = nn.Parameter(torch.zeros(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, that it is listed twice
        fusedfog.SGD([p, p], lr=0.1, momentum=0.9)


@misuse("build a second optimizer over the same parameters")
def second_optimizer() -> None:
    model = net()
    first = fusedfog.AdamW(model.parameters(), model=model)
    fusedfog.SGD(model.parameters(), lr=0.1, model=model)
    first.step()


# -- parameters and states -------------------------------------------------------------------------------------------


def iterate(model: nn.Module, opt: Any, times: int = 1) -> None:
    for _ in range(times):
        opt.zero_grad()
        model(torch.full((2, 8), 0.1)).square().sum().backward()
        opt.step()


@misuse("call `step()` after `release()`")
def released() -> None:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1)
    opt.release()
    iterate(model, opt)


@misuse("call `step()` inside `averaged()`, `swapped()` or `paused()`")
def step_inside() -> None:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1)
    with opt.averaged():
        iterate(model, opt)


@misuse("convert the model, or give a parameter another shape, after the optimizer was built")
def converted() -> None:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1)
    model.double()
    opt.step()


@misuse("put a tensor of another shape into `opt.state`")
def wrong_state() -> None:
    model = nn.Linear(3, 2)
    opt = fusedfog.AdamW(model.parameters(), model=model)
    opt.state[model.weight]["exp_avg"] = torch.zeros(5)
    opt.step()


@misuse("give `swapped()` another number of values")
def wrong_number() -> None:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1, model=model)
    with opt.swapped([torch.zeros(6, 8)]):
        pass


@misuse("give `swapped()` a value of another shape")
def wrong_shape() -> None:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1, model=model)
    with opt.swapped([p.detach().flatten() for p in model.parameters()]):
        pass


@misuse("call `averaged()` without the model, which has BatchNorm")
def without_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    opt = fusedfog.SGD(model.parameters(), lr=0.1)
    with opt.averaged():
        pass


@misuse("call `save_averaged()` with another model")
def another_model() -> None:
    opt = fusedfog.SGD(net().parameters(), lr=0.1)
    opt.save_averaged("never-written.pt", net())
