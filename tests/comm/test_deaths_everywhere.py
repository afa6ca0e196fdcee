"""A rank is killed in the middle of any call, and of a step of any kind: every other one is told so by name."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.deaths import check_named
from support.pool import Pool
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import fusedfog

LONG = 300.0
"""Seconds that the process group would wait, and nobody does."""

FATAL = 3
"""The victim dies in the repetition of this number; in the one before, its calls are counted."""

Act = Callable[[], object]


class CallCount:
    """Counts the calls of functions of fusedfog's and of torch.distributed's in this thread, and kills at one of them."""

    def __init__(self, fatal: int = -1, note: Path | None = None) -> None:
        self.count, self._fatal, self._note = 0, fatal, note

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        if event in ("call", "return") and any(
            part in frame.f_code.co_filename for part in ("fusedfog/", "distributed/")
        ):
            self.count += 1
            if self.count == self._fatal:
                die(self._note)


def die(note: Path | None) -> None:
    if note is not None:
        note.write_text(str(time.monotonic()))
    os.kill(os.getpid(), signal.SIGKILL)


def a_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))


def a_mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2))


def training(kind: str, **keywords: Any) -> Callable[[Path], Act]:
    """Steps of an optimizer."""

    def prepare(folder: Path) -> Act:
        model = a_model()
        if "mesh" in keywords:
            keywords["mesh"] = a_mesh()
        if kind == "Decentralized":
            opt: Any = fusedfog.Decentralized(torch.optim.SGD(model.parameters(), lr=0.01), **keywords)
        else:
            opt = getattr(fusedfog, kind)(model.parameters(), lr=0.01, **keywords)
        data = torch.ones(2, 40)

        def iterate() -> None:
            opt.zero_grad()
            model(data).square().mean().backward()
            opt.step()

        return iterate

    return prepare


def calling(act: Callable[[nn.Module, Any, Path], object], **keywords: Any) -> Callable[[Path], Act]:
    """A call of an optimizer that has made a step."""

    def prepare(folder: Path) -> Act:
        model = a_model()
        opt = fusedfog.SGD(model.parameters(), lr=0.01, **({"topology": "ring"} | keywords))
        model(torch.ones(2, 40)).square().mean().backward()
        opt.step()
        fusedfog.save_checkpoint(folder / "there", model, opt)
        return lambda: act(model, opt, folder)

    return prepare


def operation(act: Callable[[Tensor], object]) -> Callable[[Path], Act]:
    """A call with a plain tensor."""
    return lambda folder: lambda: act(torch.ones(1000))


def on_the_mesh(folder: Path) -> Act:
    mesh = a_mesh()
    return lambda: fusedfog.hierarchical_neighbor_allreduce(torch.ones(1000), "ring", mesh=mesh)


def on_the_mesh_later(folder: Path) -> Act:
    mesh = a_mesh()
    return lambda: fusedfog.hierarchical_neighbor_allreduce(torch.ones(1000), "ring", mesh=mesh, async_op=True).wait()


def in_turns(opt: Any, algorithms: tuple[str, str]) -> None:
    now = opt.param_groups[0].setdefault("tag", 0)
    opt.switch(algorithm=algorithms[now % 2])
    opt.param_groups[0]["tag"] = now + 1


def unevenly(model: nn.Module, opt: Any, folder: Path) -> None:
    with opt.uneven():
        for _ in range(1 + dist.get_rank() % 2):
            opt.zero_grad()
            model(torch.ones(2, 40)).square().mean().backward()
            opt.step()


def averaged(model: nn.Module, opt: Any, folder: Path) -> None:
    with opt.averaged():
        pass


def paused(model: nn.Module, opt: Any, folder: Path) -> None:
    with opt.paused():
        pass


def window(folder: Path) -> Act:
    def act() -> None:
        made = fusedfog.Window(torch.ones(10), "ring")
        made.put()
        made.fence()
        fusedfog.mean(1.0)  # A neighbour's fence needs this rank's window.
        made.close()

    return act


STEPS: dict[str, Callable[[Path], Act]] = {
    "awc": training("AdamW", topology="ring"),
    "atc": training("SGD", topology="ring", algorithm="atc", momentum=0.9),
    "gradient_tracking": training("SGD", topology="ring", algorithm="gradient_tracking"),
    "exact_diffusion": training("SGD", topology="ring", algorithm="exact_diffusion"),
    "push_sum": training("SGD", algorithm="push_sum"),
    "allreduce": training("SGD", algorithm="allreduce"),
    "mesh": training("SGD", topology="ring", mesh=None),
    "mesh, parameters": training("SGD", topology="ring", mesh=None, inside="parameters"),
    "mesh, int8, fused": training("AdamW", topology="ring", mesh=None, wire_dtype="int8", fused_backward=True),
    "data-parallel": training("AdamW", topology="ring", data_parallel_steps=10**6),
    "communicate_every": training("SGD", topology="ring", communicate_every=3),
    "global_average_every": training("SGD", topology="ring", global_average_every=2),
    "int8": training("SGD", topology="ring", wire_dtype="int8"),
    "int8, atc": training("AdamW", topology="ring", wire_dtype="int8", algorithm="atc"),
    "fused_backward": training("SGD", topology="ring", fused_backward=True),
    "fused_backward, atc": training("SGD", topology="ring", fused_backward=True, algorithm="atc"),
    "Decentralized": training("Decentralized", topology="ring"),
    "Decentralized, allreduce": training("Decentralized", algorithm="allreduce"),
    "outer": training("SGD", algorithm="local", outer=fusedfog.Outer(every=2)),
}

CALLS: dict[str, Callable[[Path], Act]] = {
    "averaged()": calling(averaged),
    "paused()": calling(paused),
    "consensus_distance()": calling(lambda model, opt, folder: opt.consensus_distance()),
    "save_checkpoint()": calling(lambda model, opt, folder: fusedfog.save_checkpoint(folder / "new", model, opt)),
    "load_checkpoint()": calling(lambda model, opt, folder: fusedfog.load_checkpoint(folder / "there", model, opt)),
    "load_state_dict()": calling(lambda model, opt, folder: opt.load_state_dict(opt.state_dict())),
    "switch()": calling(lambda model, opt, folder: in_turns(opt, ("atc", "awc"))),
    "set_topology()": calling(lambda model, opt, folder: opt.set_topology("exponential")),
    "uneven()": calling(unevenly),
    "uneven(), mesh": lambda folder: calling(unevenly, mesh=a_mesh())(folder),
    "consensus_distance(), mesh": lambda folder: calling(
        lambda model, opt, folder: opt.consensus_distance(), mesh=a_mesh()
    )(folder),
    "neighbor_allreduce()": operation(lambda x: fusedfog.neighbor_allreduce(x, "ring")),
    "neighbor_allreduce(), async": operation(lambda x: fusedfog.neighbor_allreduce(x, "ring", async_op=True).wait()),
    "neighbor_allgather()": operation(lambda x: fusedfog.neighbor_allgather(x, "ring")),
    "pair_gossip()": operation(lambda x: fusedfog.pair_gossip(x, dist.get_rank() ^ 1)),
    "hierarchical": on_the_mesh,
    "hierarchical, async": on_the_mesh_later,
    "allreduce_parameters()": operation(lambda x: fusedfog.allreduce_parameters([x])),
    "broadcast_parameters()": operation(lambda x: fusedfog.broadcast_parameters({"x": x})),
    "broadcast_optimizer_state()": calling(lambda model, opt, folder: fusedfog.broadcast_optimizer_state(opt)),
    "mean()": operation(lambda x: fusedfog.mean(1.0)),
    "agree()": operation(lambda x: fusedfog.agree(True)),
    "new_group()": operation(lambda x: fusedfog.new_group(range(4))),
    "Window": window,
}


def repeat(name: str, victim: int, part: float, folder: Path) -> tuple[str, int | None, str, float]:
    """Call it until an error ends it, or the victim in its middle; what is raised, and when."""
    fusedfog.init("gloo")
    act = (STEPS | CALLS)[name](folder)
    counter = CallCount()
    try:
        for number in range(200):
            if number < FATAL:
                dist.barrier()
            if dist.get_rank() == victim and number == FATAL - 1:
                sys.setprofile(counter)
            if dist.get_rank() == victim and number == FATAL:
                fatal = int(part * counter.count)
                if not fatal:
                    die(folder / "died")
                sys.setprofile(CallCount(fatal, folder / "died"))
            act()
            if number == FATAL - 1:
                sys.setprofile(None)
    except RuntimeError as error:
        return type(error).__name__, getattr(error, "origin", None), str(error), time.monotonic()
    return "nothing", None, "", time.monotonic()


def cases(names: dict[str, Any], quick: tuple[str, ...]) -> list[Any]:
    """(name, victim, part of the call after which it dies); what is left to `make test-all` is marked."""
    found = [(name, victim, part) for name in names for victim, part in ((0, 0.0), (3, 0.3), (0, 0.7), (3, 1.0))]
    return [one if one[0] in quick and one[2] == 0.7 else pytest.param(*one, marks=pytest.mark.slow) for one in found]


@pytest.mark.parametrize(("name", "victim", "part"), cases(STEPS, ("mesh", "int8", "outer")))
def test_a_death_in_a_step_of_any_kind_is_told_by_name(
    ranks: Pool, name: str, victim: int, part: float, tmp_path: Path
) -> None:
    check_named(ranks.outcomes(4, repeat, name, victim, part, tmp_path, pg_timeout=LONG), victim)


@pytest.mark.parametrize(("name", "victim", "part"), cases(CALLS, ("hierarchical", "uneven()", "load_checkpoint()")))
def test_a_death_in_any_call_is_told_by_name(ranks: Pool, name: str, victim: int, part: float, tmp_path: Path) -> None:
    check_named(ranks.outcomes(4, repeat, name, victim, part, tmp_path, pg_timeout=LONG), victim)
