"""What a process of an elastic run does that may be killed at any moment: for faults_elastic.py, which starts it.

It trains until it is told that it is enough, settles (some steps with a learning rate of 0, in which models only mix), and
reports what has to be the same everywhere, or to be nothing: one clock, one average to the last bit, little disagreement, and
as many updates as calls of step().
"""

from __future__ import annotations

import mmap
import time
import zlib
from typing import Any

import numpy as np
import torch
from faults_common import ELASTIC_WAYS, LARGE, LATER_WAYS, Board, Run, model_of

import fusedfog
from fusedfog.comm.elastic import run as elastic

TIMEOUT, DEAD_AFTER = 600.0, 30.0
"""Seconds that nobody must wait for: of waits, and of a process that does not answer."""

ASK_EVERY = 3
"""Steps between two questions whether it is enough: they are calls that all make together, and may be interrupted too."""

_STEPS, _PACE, _NEXT, _WITHOUT, _BEGAN, _JOINED_IN, _REFORMS_BEFORE, _REFORM = range(8)
_VICTIM, _INCARNATION, _KILLED, _ENOUGH = range(4)


class Marks:
    """What the processes of a trial tell each other, in memory that they share: a row for each slot, and one for all."""

    def __init__(self, slots: int) -> None:
        self._cells = np.frombuffer(mmap.mmap(-1, 8 * 8 * (slots + 1))).reshape(slots + 1, 8)

    @property
    def _all(self) -> Any:
        return self._cells[-1]

    # -- of the one that kills ---------------------------------------------------------------------------------------

    def clear(self, slot: int) -> None:
        """Another process begins in this slot."""
        self._cells[slot] = 0.0

    def kill(self, slot: int, incarnation: int) -> float:
        """This process is killed now; when."""
        self._all[_VICTIM], self._all[_INCARNATION] = slot, incarnation
        self._all[_KILLED] = now = time.monotonic()
        return now

    def steps(self, slot: int) -> int:
        """The clock of this slot's process."""
        return int(self._cells[slot, _STEPS])

    def pace(self, slot: int) -> float:
        """Seconds from the end of one step to that of the next, before anybody was killed."""
        return float(self._cells[slot, _PACE])

    def next(self, slot: int) -> float:
        """When it had completed its next step after the kill; 0 if it has not."""
        return float(self._cells[slot, _NEXT])

    def without(self, slot: int) -> float:
        """When it had completed its first step as a member of a run without the victim; 0 if it has not."""
        return float(self._cells[slot, _WITHOUT])

    def reform(self, slot: int) -> float:
        """Seconds in which it waited for that run's epochs to form."""
        return float(self._cells[slot, _REFORM])

    def began(self, slot: int) -> float:
        """When it had completed its first step of all."""
        return float(self._cells[slot, _BEGAN])

    def joined_in(self, slot: int) -> float:
        """Seconds that the construction of its optimizer took."""
        return float(self._cells[slot, _JOINED_IN])

    @property
    def enough(self) -> bool:
        """Whether the trial is to end."""
        return bool(self._all[_ENOUGH])

    @enough.setter
    def enough(self, value: bool) -> None:
        self._all[_ENOUGH] = value

    # -- of a process ------------------------------------------------------------------------------------------------

    def built(self, slot: int, seconds: float) -> None:
        """Its optimizer has been constructed."""
        self._cells[slot, _JOINED_IN] = seconds

    def stepped(self, slot: int, steps: int, seconds: float, members: tuple[str, ...], reform_s: float) -> None:
        """It has completed a step, so many seconds after the last one; `reform_s` as in `stats()`."""
        own, now = self._cells[slot], time.monotonic()
        own[_STEPS], own[_BEGAN] = steps, own[_BEGAN] or now
        if not self._all[_KILLED]:
            own[_REFORMS_BEFORE] = reform_s
            own[_PACE] = 0.7 * own[_PACE] + 0.3 * seconds if own[_PACE] else seconds
            return
        own[_NEXT] = own[_NEXT] or now
        if f"{self._all[_VICTIM]:.0f}.{self._all[_INCARNATION]:.0f}" not in members and not own[_WITHOUT]:
            own[_WITHOUT], own[_REFORM] = now, reform_s - own[_REFORMS_BEFORE]


class Member:
    """A process' part in a trial.

    Args:
        slot, incarnation: which it is.
        plan: `faults_elastic.Plan`.
        folder: for checkpoints.
    """

    def __init__(self, slot: int, incarnation: int, plan: Any, board: Board, marks: Marks, folder: str) -> None:
        self.slot, self.plan, self.board, self.marks, self.folder = slot, plan, board, marks, folder
        self.changes: list[fusedfog.Change] = []
        fusedfog.init(elastic=True, timeout=TIMEOUT, dead_after=DEAD_AFTER, on_membership_change=self.changes.append)
        self._show_reforms()
        torch.manual_seed(0)
        self.model, begin = model_of(plan.megabytes), time.monotonic()
        with board.phase(slot, "joining" if incarnation else "construction"):
            self.opt = (ELASTIC_WAYS | LATER_WAYS)[plan.way](self.model, None)
        marks.built(slot, time.monotonic() - begin)
        self.calls, self.updates_before = 0, max(0, self._updates())

    def _show_reforms(self) -> None:
        """Say it on the board when this process goes over to another epoch."""
        run: Any = elastic.Run.current()
        enter = run._enter

        def shown(*given: Any) -> Any:
            with self.board.phase(self.slot, "re-forming"):
                return enter(*given)

        run._enter = shown

    def _updates(self) -> int:
        """How many updates the optimizer has counted; -1 if it counts none, or not all parameters' alike."""
        counts = {int(state["step"]) for state in self.opt.state.values() if "step" in state}
        return counts.pop() if len(counts) == 1 else -1

    def train(self) -> None:
        """Until all agree that it is enough."""
        weight = next(self.model.parameters())
        x, last = torch.ones(2, weight.shape[1], dtype=weight.dtype), time.monotonic()
        while True:
            with self.board.phase(self.slot, "forward"):
                self.opt.zero_grad()
                (self.model(x) - self.slot).float().square().mean().backward()
            self._step()
            now = time.monotonic()
            run = elastic.Run.current()
            assert run is not None and run.record is not None
            self.marks.stepped(self.slot, self.opt.steps, now - last, run.record.uids, run.reform_s)
            last = now
            self._call()
            if self.opt.steps % ASK_EVERY == 0 and fusedfog.agree(self.marks.enough):
                return

    def _step(self) -> None:
        with self.board.phase(self.slot, "step"):
            self.opt.step()
        self.calls += 1

    def _call(self) -> None:
        if self.plan.phase == "averaged":
            with self.board.phase(self.slot, "averaged"), self.opt.averaged():
                pass
        if self.plan.phase == "save":
            with self.board.phase(self.slot, "save"):
                fusedfog.save_checkpoint(f"{self.folder}/checkpoint", self.model, self.opt, keep=1)

    def settle(self) -> Run:
        """Mix only, and report."""
        calls, updates = self.calls, self._updates()  # With a learning rate of 0 some count none.
        goal = self.opt.steps + (15 if self.plan.megabytes > LARGE else 60)
        before = self.opt.consensus_distance()
        for group in self.opt.param_groups:
            group["lr"] = 0.0
        for param in self.model.parameters():
            param.grad = torch.zeros_like(param)
        while self.opt.steps < goal:
            self._step()
        after = self.opt.consensus_distance()
        params = [param.detach() for param in self.model.parameters()]
        with self.opt.averaged():
            crc, norm = 0, torch.stack([param.double().norm() for param in params]).norm().item()
            for param in params:
                crc = zlib.crc32(param.contiguous().view(torch.uint8).numpy(), crc)
        stats = self.opt.stats()
        return {
            "steps": self.opt.steps,
            "members": stats["members"],
            "distance before": before,
            "distance": after,
            "norm": norm,
            "average": crc,
            "finite": all(bool(param.isfinite().all()) for param in params),
            "calls": calls,
            "updates": updates - self.updates_before if updates >= 0 else None,
            "reforms": stats["reforms"],
            "reform_s": stats["reform_s"],
            "joined": [uid for change in self.changes for uid in change.joined],
            "left": [[uid, change.cause] for change in self.changes for uid in change.left],
        }


def train(slot: int, incarnation: int, plan: Any, board: Board, marks: Marks, folder: str) -> Run:
    """All that a process does."""
    member = Member(slot, incarnation, plan, board, marks, folder)
    member.train()
    return member.settle()
