"""Kill -9 at random moments of elastic runs, and see the others train on: python bench/faults.py --elastic

Processes on one machine, each of them a member. One is killed at a random moment of a phase: while it builds its optimizer, in
forward and backward, in step(), averaged() or save_checkpoint(); while members form another epoch, since a first one was killed;
or while the first one, started again, joins: it itself, or another member then. In half of the trials the dead are started
again (by a fork: a restarted Python would import for seconds) and join. At the end all mix for some steps with a learning rate
of 0, and report. What is recorded of each survivor: seconds from the kill until it has completed a step in an epoch without the
victim, and whether its `Change`, with its cause, names that. What is checked of all:

    they have come to the end          nobody hangs, and nobody has raised anything
    one clock, one set of members      the newcomers' too
    one average                        `averaged()` has the same bits everywhere, and nothing that is not finite
    little disagreement                consensus_distance(), over the norm of the average
    updates                            Adam has counted as many as there were calls of step()

(results/faults-elastic.json and .md; faults_members.py is what the processes do)
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from faults_common import ELASTIC_WAYS, LARGE, LATER_FROM, LATER_WAYS, MODELS, Board, Run, await_moment
from faults_members import Marks, train
from faults_processes import Processes
from tqdm import tqdm

ADDED = ("re-forming", "joining")
PHASES = ("construction", "forward", "step", "averaged", "save", *ADDED)
LIMIT, LONG_LIMIT = 60.0, 300.0
"""Seconds in which a survivor is to step on, a newcomer to join, and all to settle; with models whose steps take seconds."""

SOON = 2.0
"""Seconds in which all survivors are to have stepped on."""

NEAR = 1e-2
"""Disagreement, over the norm of the average, that is left at most after mixing."""


@dataclass(frozen=True)
class Plan:
    """One trial.

    Attributes:
        first: the slot that is killed before, in the phases "re-forming" and "joining", where it is started again; or -1.
        victim: the slot whose process is killed at the moment that counts; in "joining" it may be `first` again.
        back: the dead are started again afterwards.
    """

    number: int
    ranks: int
    megabytes: float
    way: str
    phase: str
    first: int
    victim: int
    back: bool

    @classmethod
    def draw(cls, number: int, seed: int) -> Plan:
        """The trial of this number. Phases and models go round, so that each pair is as frequent."""
        chance = random.Random(f"elastic {seed} {number}")
        ranks, way = chance.choice((4, 6)), chance.choice(list(LATER_WAYS if number >= LATER_FROM else ELASTIC_WAYS))
        phase, megabytes = PHASES[number % len(PHASES)], MODELS[number // len(PHASES) % len(MODELS)]
        victim, first = chance.sample(range(ranks), 2)
        if phase not in ADDED:
            first = -1
        elif phase == "joining" and chance.random() < 0.5:
            first = victim
        return cls(number, ranks, megabytes, way, phase, first, victim, chance.random() < 0.5)

    def gigabytes(self) -> float:
        """Memory that all processes take together, at most."""
        return self.ranks * (0.3 + 8 * self.megabytes / 1e3)

    @property
    def limit(self) -> float:
        """Seconds for each part of the trial."""
        return LONG_LIMIT if self.megabytes > LARGE else LIMIT


class Trial:
    """One run with its kills.

    Args:
        usual: seconds that constructions and joins of a model of so many megabytes took the last time; the trial's are noted.
    """

    def __init__(self, plan: Plan, seed: int, usual: dict[tuple[str, float], float]) -> None:
        self.plan, self.usual, self.chance = plan, usual, random.Random(f"elastic {seed} {plan.number} moment")
        self.board, self.marks = Board(plan.ranks, PHASES), Marks(plan.ranks)
        self.processes = Processes(plan.ranks, self._work)
        self.uid = self.processes.uid

    @property
    def living(self) -> list[int]:
        """See `Processes`."""
        return self.processes.living

    def _work(self, slot: int, incarnation: int) -> Run:
        return train(slot, incarnation, self.plan, self.board, self.marks, self.processes.folder)

    def start(self, slot: int) -> float:
        """Start the next process of a slot; when."""
        self.board.clear(slot)
        self.marks.clear(slot)
        return self.processes.start(slot)

    def wait(self, done: Callable[[], bool]) -> bool:
        """Until it is done, or the time is over; whether it is done."""
        return self.processes.wait(done, self.plan.limit)

    # -- what happens, in order --------------------------------------------------------------------------------------

    def come_to_the_moment(self) -> float | None:
        """Return when the victim is to be killed; seconds since the phase of the plan began, None if it has not come there."""
        plan, chance = self.plan, self.chance
        for slot in range(plan.ranks):
            self.start(slot)
        if plan.phase == "construction":
            return self._moment(plan.victim, plan.phase, 1, 0.1)
        if plan.phase not in ADDED:
            return self._moment(plan.victim, plan.phase, 2 if plan.megabytes > LARGE else chance.randint(2, 20), 0.1)
        steps = 2 if plan.megabytes > LARGE else chance.randint(2, 20)
        if not self.wait(lambda: all(self.marks.steps(slot) >= steps for slot in self.living)):
            return None
        self.processes.kill(plan.first)
        if plan.phase == "re-forming":
            return self._moment(plan.victim, plan.phase, 1, 0.05)
        time.sleep(chance.uniform(0.0, 0.5))
        self.start(plan.first)
        return self._moment(plan.first, plan.phase, 1, 0.3)

    def _moment(self, slot: int, phase: str, at_least: int, usual: float) -> float | None:
        usual = self.usual.get((phase, self.plan.megabytes), usual)
        return await_moment(self.board, slot, phase, at_least, usual, self.chance, self.plan.limit)

    def kill_victim(self) -> Run:
        """Kill it, and wait until all others have stepped on."""
        plan, marks = self.plan, self.marks
        inside, uid = self.board.phase_of(plan.victim), self.uid(plan.victim)
        joining = plan.first if plan.phase == "joining" and plan.first != plan.victim else -1
        if plan.phase in ("construction", "joining"):
            self.usual[plan.phase, plan.megabytes] = marks.joined_in(max(joining, 0)) or 0.3
        killed = marks.kill(plan.victim, self.processes.incarnations[plan.victim])
        self.processes.kill(plan.victim)
        others = [slot for slot in self.living if slot != joining]
        self.wait(lambda: all(marks.without(slot) for slot in others if slot in self.living))
        went_on = [slot for slot in others if marks.without(slot)]
        return {
            "killed": uid,
            "killed in": inside,
            "others": [self.uid(slot) for slot in others],
            "hang": [self.uid(slot) for slot in others if slot in self.living and slot not in went_on],
            "seconds": max((marks.without(slot) - killed for slot in went_on), default=None),
            "next step": max((marks.next(slot) - killed for slot in others if marks.next(slot)), default=None),
            "reform": max((marks.reform(slot) for slot in went_on), default=None),
            "pace": max((marks.pace(slot) for slot in others), default=None),
        }

    def come_back(self) -> Run:
        """Start the dead again, if it is planned, and wait until all that live have made some steps."""
        marks, newcomers = self.marks, dict[int, float]()
        if self.plan.back:
            for slot in set(range(self.plan.ranks)) - set(self.living):
                time.sleep(self.chance.uniform(0.0, 0.5))
                newcomers[slot] = self.start(slot)
        goal = max(marks.steps(slot) for slot in self.living) + 3
        self.wait(lambda: all(marks.steps(slot) >= goal for slot in self.living))
        for slot in newcomers:
            if marks.began(slot):
                self.usual["joining", self.plan.megabytes] = marks.joined_in(slot)
        joined = {self.uid(slot): marks.began(slot) - begin for slot, begin in newcomers.items() if marks.began(slot)}
        return {"started again": [self.uid(slot) for slot in newcomers], "joined": joined}

    def finish(self) -> None:
        """Have all that live report."""
        self.marks.enough = True
        self.wait(self.processes.all_reported)


def faults_of(run: Run, reports: dict[str, Run], living: Sequence[str]) -> list[str]:
    """What is not as it should be, in words."""
    found = [f"{uid} hangs" for uid in run["hang"]]
    found += [f"{uid} has raised: {report['error']}" for uid, report in reports.items() if "error" in report]
    found += [f"{uid} has not come to the end" for uid in living if uid not in reports]
    ended = {uid: report for uid, report in reports.items() if "error" not in report}
    for name in ("steps", "members", "average"):
        if len({json.dumps(report[name]) for report in ended.values()}) > 1:
            found.append(f"{name} differ: { {uid: report[name] for uid, report in ended.items()} }")
    for uid, report in ended.items():
        if tuple(report["members"]) != tuple(living):
            found.append(f"{uid} has other members: {report['members']}")
        if not report["finite"]:
            found.append(f"{uid} has values that are not finite")
        if not report["distance"] <= NEAR * report["norm"]:
            found.append(f"{uid} is apart: {report['distance']:.3g} at a norm of {report['norm']:.3g}")
        if report["updates"] not in (None, report["calls"]):
            found.append(f"{uid}: {report['updates']} updates by {report['calls']} calls")
    return found


def names(run: Run, reports: dict[str, Run]) -> dict[str, int]:
    """How many survivors were told that the victim has left, if it was a member, and by which cause."""
    slot, _, incarnation = run["killed"].partition(".")
    if incarnation != "0" and not any(run["killed"] in report.get("joined", []) for report in reports.values()):
        return {"survivors": 0, "told": 0, "by cause": 0}
    told = [report.get("left", []) for report in reports.values()]
    own = [[cause for uid, cause in left if uid == run["killed"]] for left in told]
    return {
        "survivors": len(run["others"]),
        "told": sum(bool(causes) for causes in own),
        "by cause": sum(any(f"slot {slot} " in cause for cause in causes) for causes in own),
    }


def make(plan: Plan, seed: int, constructions: dict[tuple[str, float], float]) -> Run:
    """One trial as it is kept."""
    trial = Trial(plan, seed, constructions)
    with trial.processes as processes:
        when = trial.come_to_the_moment()
        before = [] if when is not None else [f"the victim has not come there in {plan.limit:g} s: {processes.logs()}"]
        run: Run = asdict(plan) | {"ms into the phase": round(1e3 * (when or 0.0), 1)} | trial.kill_victim()
        if not run["hang"]:
            run |= trial.come_back()
            trial.finish()
        reports = processes.reports
        run["wrong"] = before + faults_of(run, reports, [trial.uid(slot) for slot in trial.living])
        run["names"] = names(run, {uid: reports[uid] for uid in run["others"] if uid in reports})
        run["reports"] = reports
        if run["wrong"]:
            run["logs"] = processes.logs()
    show(run)
    return run


def show(run: Run) -> None:
    """One line of a trial, and what is not as it should be."""
    seconds, reform = ("-" if one is None else f"{one:.2f}" for one in (run["seconds"], run["reform"]))
    about = f"{run['phase']}, {run['megabytes']:g} MB, {run['way']}, {run['killed']} of {run['ranks']} in {run['killed in']}"
    joins = ", ".join(f"{uid} in {second:.1f} s" for uid, second in run.get("joined", {}).items())
    tqdm.write(
        f"{run['number']}: {about}: {seconds} s, of these {reform} in re-forming (a step: {run['pace']:.2f} s); joined: "
        f"{joins or '-'}; {run['names']['told']} of {run['names']['survivors']} told"
    )
    for words in run["wrong"]:
        tqdm.write(f"    {words}")


def row_of(runs: Sequence[Run], **first: Any) -> Run:
    """One line of a table."""
    seconds = [run["seconds"] for run in runs if run["seconds"] is not None]
    joins = [second for run in runs for second in run.get("joined", {}).values()]
    reports = [report for run in runs for report in run["reports"].values() if "error" not in report]
    told, by_cause, others = (sum(run["names"][name] for run in runs) for name in ("told", "by cause", "survivors"))
    return first | {
        "kills": len(runs),
        "survivors that hang": sum(len(run["hang"]) for run in runs),
        "runs in which something is wrong": sum(bool(run["wrong"]) for run in runs),
        "s until all have stepped on, median": statistics.median(seconds) if seconds else None,
        "largest": max(seconds, default=None),
        "s of it in re-forming, median": statistics.median(
            [run["reform"] for run in runs if run["reform"] is not None] or [0]
        ),
        "s of a step before, median": statistics.median([run["pace"] for run in runs]),
        f"within {SOON:g} s": f"{sum(second <= SOON for second in seconds)} of {len(runs)}",
        "back": f"{len(joins)} of {sum(len(run.get('started again', [])) for run in runs)}",
        "s to a newcomer's first step, median": statistics.median(joins) if joins else None,
        "largest disagreement": max((report["distance"] / report["norm"] for report in reports), default=None),
        "told who left": f"{told} of {others}",
        "with it as the cause": f"{by_cause} of {others}",
    }
