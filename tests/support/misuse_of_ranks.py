"""What ranks do wrong together, and what they are told: see `support.misuse`."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import fusedfog
from support.misuse import build_one, iterate, net, said, started
from support.pool import Pool
from support.waits import await_said, end_all_but, meet, pids_of_all, say, shorten, unhurried

Texts = dict[str, str]
TIMEOUT = 2.0
"""Seconds until ranks that wait for others give up, from the moment on at which they do what is wrong."""


class Said(Exception):
    """What a rank was told in a world that cannot be used any more, as JSON; so the pool replaces its process."""


@dataclass(frozen=True)
class World:
    """Ranks that do something wrong.

    Attributes:
        rows: of the table.
        size: number of ranks.
        misuse: what every rank runs; it returns, or raises as `Said`, what this rank was told, by row.
        slow: whether it takes long.
        keywords: of `Pool.outcomes`.
    """

    rows: tuple[str, ...]
    size: int
    misuse: Callable[[], Texts]
    slow: bool
    keywords: dict[str, Any]

    def told(self, ranks: Pool) -> Texts:
        """Do it; by row, what the first rank that has it was told."""
        texts: Texts = {}
        for outcome in reversed(ranks.outcomes(self.size, self.misuse, **self.keywords)):
            assert outcome.ok or outcome.error_type in ("Said", "Died", "Hung"), outcome
            texts.update(json.loads(outcome.message) if outcome.error_type == "Said" else outcome.value or {})
        return texts


WORLDS: dict[str, World] = {}


def world(*rows: str, size: int = 2, slow: bool = False, **keywords: Any) -> Callable[[Callable[[], Texts]], Any]:
    """This is done by `size` ranks, which see these rows."""

    def keep(function: Callable[[], Texts]) -> Callable[[], Texts]:
        WORLDS[function.__name__] = World(rows, size, function, slow, keywords)
        return function

    return keep


def end(texts: Texts) -> Texts:
    """Leave a world in which messages may have been lost.

    A rank whose end would be another error for the others meets them before, when all are told.
    """
    raise Said(json.dumps(texts))


# -- starting --------------------------------------------------------------------------------------------------------

BY_MULTIPROCESSING = "the same with `multiprocessing`"


def child(pipe: Connection) -> None:
    with started():
        pipe.send(said(build_one))


@world(BY_MULTIPROCESSING, size=1, init=False)
def by_multiprocessing() -> Texts:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(theirs,))
    process.start()
    text = ours.recv()
    process.join()
    return {BY_MULTIPROCESSING: text}


# -- building an optimizer -------------------------------------------------------------------------------------------

OTHER_OPTIONS = "build it with other options, or another model, on one rank"
FROZEN = "freeze a parameter on some ranks only"
WEIGHED = "give `weight=` on some ranks only"
UNDER_DDP = "wrap the model in `DistributedDataParallel`"
TOO_STRONG = "give `mix_strength=` a function whose value in some step is not from 0 to 1"
OTHER_CALL = "call `averaged()` on rank 0, and `consensus_distance()` on the others"


@world(OTHER_OPTIONS, WEIGHED, TOO_STRONG, FROZEN, UNDER_DDP, OTHER_CALL)
def nothing_was_sent() -> Texts:
    """All of this is noticed before anything is sent, so that ranks can go on."""
    rank, model = dist.get_rank(), net()

    def frozen() -> None:
        other = net()
        other[1].weight.requires_grad_(rank == 0)  # type: ignore[index]
        fusedfog.SGD(other.parameters(), lr=0.1, model=other)

    def too_strong() -> None:
        weak = net()
        iterate(weak, fusedfog.SGD(weak.parameters(), lr=0.1, mix_strength=lambda step: 0.5 * step), 4)

    def wrapped() -> None:
        inner = net()
        ddp = DistributedDataParallel(inner)
        iterate(ddp, fusedfog.SGD(inner.parameters(), lr=0.1))

    def apart() -> None:
        opt = fusedfog.SGD(model.parameters(), lr=0.1)
        if rank == 0:
            with opt.averaged():
                pass
        else:
            opt.consensus_distance()

    return {
        OTHER_OPTIONS: said(lambda: fusedfog.SGD(net().parameters(), lr=0.1, momentum=0.9 * rank)),
        WEIGHED: said(lambda: fusedfog.SGD(net().parameters(), lr=0.1, weight=None if rank else 16)),
        TOO_STRONG: said(too_strong),
        FROZEN: said(frozen),
        UNDER_DDP: said(wrapped),
        OTHER_CALL: said(apart),
    }


# -- parameters ------------------------------------------------------------------------------------------------------

EDITED = "edit parameters between steps: `p.data.copy_()`, `clamp_`, `model.load_state_dict(best)`"
UNFROZEN = "unfreeze a parameter on some ranks only"


@world(EDITED)
def edits() -> Texts:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1)

    def edit() -> None:
        iterate(model, opt)
        for p in model.parameters():
            p.data.mul_(0.5)
        iterate(model, opt)

    return {EDITED: said(edit)}


@world(UNFROZEN)
@unhurried()
def unfrozen_alone() -> Texts:
    model = net()
    model[1].requires_grad_(False)  # type: ignore[index]
    opt = fusedfog.SGD(model.parameters(), lr=0.1, model=model)
    # A step without the other: its message of this step is there.
    iterate(model, opt, 1 + dist.get_rank())
    meet("before")
    shorten(TIMEOUT)
    if dist.get_rank() == 0:
        model[1].requires_grad_(True)  # type: ignore[index]
    text = said(lambda: iterate(model, opt, 9))
    meet("told")
    return end({UNFROZEN: text} if dist.get_rank() == 0 else {})


# -- NaN -------------------------------------------------------------------------------------------------------------

NAN = "one rank's gradient is NaN"
IN_GRADIENTS = "the same with `allreduce`, on that rank"
CONSERVED = "the same with `push_sum`, `exact_diffusion`, `extra`, or a tracking method, on every rank"
COMPRESSED = "the same with `wire_dtype`, on that rank"


def overflow(**keywords: Any) -> str:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1, **keywords)

    def train() -> None:
        for step in range(6):
            for p in model.parameters():
                p.grad = torch.full_like(p, float("nan") if dist.get_rank() == 1 and step == 2 else 0.1)
            opt.step()

    return said(train)


@world(NAN, IN_GRADIENTS)
def not_finite() -> Texts:
    mixed, reduced = overflow(), overflow(algorithm="allreduce")
    return {NAN: mixed} if dist.get_rank() == 0 else {IN_GRADIENTS: reduced}


@world(CONSERVED)
def conserved() -> Texts:
    return end({CONSERVED: overflow(algorithm="extra")})


@world(COMPRESSED)
def compressed() -> Texts:
    text = overflow(wire_dtype="int8")
    return end({COMPRESSED: text} if dist.get_rank() == 1 else {})


# -- calls that not all ranks make -----------------------------------------------------------------------------------

ON_RANK_0 = "call `averaged()` on rank 0 alone, or stop early on one rank and evaluate there"
ITS_LOG = "the same, after 20 s: a warning in the log `fusedfog`"
ON_THE_OTHERS = "the same, on the other ranks"
ONE_MORE_STEP = "make one more step on rank 0, while the others go on without fusedfog"
OTHERS_ENDED = "the same, when the others have ended"
STOPPED = "suspend a process (`kill -STOP`), or cut it off"
SAME_BATCHES = "feed all ranks the same batches, as by `DataLoader(data, shuffle=True)` with one seed"
DRIFTED = "change the learning rate on one rank"
OF_A_MACHINE = "the same with `mesh=`, on one rank of a machine; on the other"
TWICE = "two backwards before `step()` inside `uneven()`, where backward averages gradients"
RAISED = "leave `uneven()` by an error on one rank; on those that have no more data"
LEFT = "call `leave()` on one rank; on the others"


@world(ON_RANK_0, ITS_LOG, ON_THE_OTHERS, size=4)
@unhurried()
def averaged_alone() -> Texts:
    os.environ["FUSEDFOG_WAIT_LOG_S"] = str(TIMEOUT / 4)  # Long before it gives up.
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fusedfog").addHandler(handler)
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="fully_connected", model=model)
    # The others make a step without rank 0, whose message of this step is there, so that all of them are in the next one.
    iterate(model, opt, 3 if dist.get_rank() else 2)
    meet("before")
    shorten(TIMEOUT)
    if dist.get_rank():
        texts = {ON_THE_OTHERS: said(lambda: iterate(model, opt, 9))}
    else:
        texts = {
            ON_RANK_0: said(lambda: opt.averaged().__enter__()),
            ITS_LOG: [line for line in lines if " in averaged() for " in line][-1],
        }
    meet("told")
    return end(texts)


def one_more(ends: bool) -> str:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="fully_connected", algorithm="atc")
    iterate(model, opt, 2)
    text = ""
    if ends:
        end_all_but([0])
    else:
        meet("before")
        shorten(TIMEOUT)
    if dist.get_rank() == 0:
        text = said(lambda: iterate(model, opt))
    if not ends:
        meet("told")
    return text


@world(ONE_MORE_STEP, size=3)
@unhurried()
def one_more_step() -> Texts:
    text = one_more(ends=False)
    return end({ONE_MORE_STEP: text} if text else {})


@world(OTHERS_ENDED, size=3)
@unhurried()
def others_ended() -> Texts:
    return end({OTHERS_ENDED: one_more(ends=True)})


@world(STOPPED, size=3, slow=True)
def stopped() -> Texts:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="fully_connected")
    iterate(model, opt, 2)
    opt.drain()  # its last message has arrived
    pids = pids_of_all()
    meet("before")
    shorten(TIMEOUT)
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    text = said(lambda: iterate(model, opt, 9))
    say(f"told/{dist.get_rank()}")
    await_said("told/0", "told/2")
    if dist.get_rank() == 0:
        os.kill(pids[1], signal.SIGKILL)  # It would be waited for.
    return end({STOPPED: text})


def last_of_all(step: int, make: Callable[[], object]) -> None:
    """Make a step, around the comparison on rank 0 when all others have made it: who compares last sees what all others wrote."""
    if step >= 97 and dist.get_rank() == 0:  # What it sent for this step left at the end of the one before.
        await_said(*(f"{step}/{rank}" for rank in range(1, dist.get_world_size())))
    make()
    if step >= 97:
        say(f"{step}/{dist.get_rank()}")


@world(DRIFTED, size=4)
def drifted() -> Texts:
    p = nn.Parameter(torch.zeros(3))
    opt = fusedfog.SGD([p], lr=0.1, topology="fully_connected")

    def train() -> None:
        for step in range(101):
            p.grad = torch.full((3,), 1.0 + dist.get_rank())
            if step == 50 and dist.get_rank() == 2:
                opt.param_groups[0]["lr"] = 0.05
            last_of_all(step, opt.step)

    return {DRIFTED: said(train)}


@world(SAME_BATCHES, size=2)
def same_batches() -> Texts:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.001)

    def train() -> None:
        for step in range(101):
            last_of_all(step, lambda: iterate(model, opt))

    text = said(train) if dist.get_rank() == 0 else train()
    return end({SAME_BATCHES: str(text)} if dist.get_rank() == 0 else {})


@world(OF_A_MACHINE, size=4)
def unlike_its_machine() -> Texts:
    model = net()
    mesh = init_device_mesh("cpu", (2, 2))
    opt = fusedfog.SGD(model.parameters(), lr=0.01, mesh=mesh, topology="ring")

    def train() -> None:
        for step in range(70):
            if step == 50 and dist.get_rank() == 3:
                opt.param_groups[0]["lr"] = 0.005
            iterate(model, opt)

    text = said(train)
    meet("told")
    return end({OF_A_MACHINE: text} if dist.get_rank() == 2 else {})


@world(TWICE)
def averaged_twice() -> Texts:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1, algorithm="allreduce")
    with opt.uneven():
        loss = model(torch.ones(4, 8)).square().mean()
        loss.backward(retain_graph=True)
        text = said(loss.backward)
        opt.step()
    return {TWICE: text}


@world(RAISED)
@unhurried()
def raised() -> Texts:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1)

    def train() -> None:
        with opt.uneven():
            for step in range(3 if dist.get_rank() == 0 else 9):
                if step == 3:
                    raise LookupError("no such file")
                iterate(model, opt)

    text = said(train)
    return end({RAISED: text} if dist.get_rank() == 0 else {})


@world(LEFT, size=3)
def left() -> Texts:
    model = net()
    opt = fusedfog.SGD(model.parameters(), lr=0.1, topology="fully_connected")
    iterate(model, opt, 3)
    texts = {}
    if dist.get_rank() == 2:
        opt.leave()
    else:
        iterate(model, opt)  # Its message of this step is there.
    meet("left")
    if dist.get_rank() != 2:
        texts = {LEFT: said(lambda: iterate(model, opt, 9))}
    meet("told")
    return end(texts)
