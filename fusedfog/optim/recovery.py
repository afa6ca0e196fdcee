"""An optimizer in an elastic run: how it is built, by the first members or by a newcomer, and how it goes over to others.

    before each step    a newcomer wishes for the state: it is written      the epoch is over: go over to the next one
    in other calls      one that the end of the epoch has interrupted is made again, by all members or by none

`comm.elastic` has the protocol; here is what it means for parameters, states, topology and clock.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fusedfog.comm.agreement import differences
from fusedfog.comm.elastic.forming import Dropped, Evicted
from fusedfog.comm.elastic.record import Position, Record
from fusedfog.comm.elastic.run import Run
from fusedfog.comm.group import find_group
from fusedfog.comm.registry import communicator_for
from fusedfog.engine.scheduler import Scheduler
from fusedfog.errors import ExchangeError, Minority, MismatchError, PeerTimeout, StoreLost
from fusedfog.log import log
from fusedfog.optim import build as construction
from fusedfog.optim.checkpoint_file import TensorFile, Written, write
from fusedfog.optim.clock_reads import ClockReads
from fusedfog.optim.members import topology_of_members
from fusedfog.optim.options import Options
from fusedfog.optim.parameters import Groups, describe, fields_of, parameters_of
from fusedfog.optim.plain_data import decode, encode
from fusedfog.optim.shared import shared_with_model
from fusedfog.params.owners import Claim

R = TypeVar("R")

_INTERRUPTED = (PeerTimeout, ExchangeError, StoreLost)
_ASK_AGAIN = 0.3
_REASON = "given to the run"
"""Of a newcomer's topology, which nobody has told it."""


class Recovering(Protocol):
    """What is needed of an optimizer."""

    param_groups: Groups
    _options: Options
    _family: str
    _scheduler: Scheduler | None

    @property
    def _kind(self) -> str: ...

    def state_dict(self) -> dict[str, Any]:
        """Its states and clock."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them."""
        ...


def build_scheduler(opt: Recovering, claim: Claim) -> Scheduler:
    """See `construction.build`; in an elastic run with the other members, or as a newcomer to them, which is not collective.

    Raises:
        ValueError: this process of an elastic run has an optimizer already; and as `construction.build`.
        MismatchError: a newcomer's model or options are not those of the run; names the field.
        Minority, PeerTimeout: as `Run.reform`.
    """
    run = Run.current()
    if run is None:
        return construction.build(opt._kind, opt.param_groups, opt._family, opt._options, claim)
    if run.built:
        raise ValueError(
            f"{opt._kind}: this process has an optimizer in its elastic run already, and a second one is none of the run's: "
            f"give both models' parameters to one optimizer, as param groups, or start without elastic=True"
        )
    while True:
        engine = _with_others(opt, run, claim) if run.record is not None else _as_newcomer(opt, run, claim)
        if engine is not None:
            run.built = True
            return engine
        claim.drop()


def _with_others(opt: Recovering, run: Run, claim: Claim) -> Scheduler | None:
    """Built by all members together; None if they have changed meanwhile, and it is to be done again."""
    cause = "an optimizer was being built"
    try:
        engine = construction.build(opt._kind, opt.param_groups, opt._family, opt._options, claim)
        if run.commit():
            engine.members = Recovery(opt, run)
            engine.exchanges.survive(engine.members.lost)
            return engine
        if engine.exchanges.windows is not None:
            engine.exchanges.windows.close(0.0)
    except _INTERRUPTED as error:
        cause = brief(error, run)
    _begin_anew(run, cause)
    return None


def _begin_anew(run: Run, cause: str) -> None:
    """Be a member before there is an optimizer, or a newcomer if others have one."""
    try:
        run.reform("construction", 0, 0, cause)
        run.tell()
    except Dropped:
        run.stand_alone()


def _as_newcomer(opt: Recovering, run: Run, claim: Claim) -> Scheduler | None:
    """Built alone, then with a member's parameters, states and clock, and admitted; None if there is nobody any more to join."""
    engine = construction.build(opt._kind, opt.param_groups, opt._family, opt._options, claim)
    opt._scheduler = engine
    if not _fetch(opt, engine, run):
        opt._scheduler = None
        _begin_anew(run, "all members have ended")
        return None
    run.built = True
    engine.members = recovery = Recovery(opt, run)
    recovery.go_over("join", f"slot {run.identity.slot} came")
    recovery.clock_reads.move(0, engine.clock.steps)
    return engine


def _fetch(opt: Recovering, engine: Scheduler, run: Run) -> bool:
    """Take over what a member has; False if there is no member any more."""
    deadline = time.monotonic() + run.timeout
    with tempfile.TemporaryDirectory(prefix="fusedfog-") as folder:
        path = Path(folder) / "state"
        while run.newest() is not None:
            found = None
            with contextlib.suppress(OSError, StoreLost):
                found = run.fetch(path)
            if found is not None:
                _load(opt, engine, path, Written(*found))
                return True
            if time.monotonic() > deadline:
                raise PeerTimeout(f"slot {run.identity.slot}: no member has handed over its state in {run.timeout:g} s")
            time.sleep(_ASK_AGAIN)
    return False


def _load(opt: Recovering, engine: Scheduler, path: Path, written: Written) -> None:
    file = TensorFile(path, written)
    try:
        said = decode(file.data, file.read)
    finally:
        file.close()
    found = differences([said["fields"], _fields(opt)])
    if found:
        raise MismatchError(
            f"{opt._kind}: this process joins a run of another model, or with other options (rank 0 is a member of it, rank 1 "
            f"this process): {found}"
        )
    with torch.no_grad():
        for own, theirs in zip(_tensors(opt), said["tensors"], strict=True):
            own.copy_(theirs)
    opt.load_state_dict(said["optimizer"])
    engine.buckets.bump_versions()


def _fields(opt: Recovering) -> dict[str, str]:
    """What members agree on at construction, and a newcomer with them. Learning rates and their like may have changed since."""
    specs = describe(opt.param_groups, 0, opt._options.model)
    fields = fields_of(opt._kind, opt.param_groups, specs, opt._options)
    return {name: value for name, value in fields.items() if " of group " not in name or name.startswith("parameter ")}


def _tensors(opt: Recovering) -> list[Tensor]:
    """What members have in common beside states: parameters, and what else the model has."""
    beside = shared_with_model(opt._options.model, opt.param_groups) if opt._options.model is not None else {}
    return [tensor.detach() for tensor in (*parameters_of(opt.param_groups), *beside.values())]


class Recovery:
    """See `engine.between_phases.Members`; of one optimizer."""

    def __init__(self, opt: Recovering, run: Run) -> None:
        self._opt, self.run = weakref.ref(opt), run
        run.again, run.write = self.make_again, self._write
        run.unwaited = opt._options.asynchronous
        self._cause = ""
        self._served: tuple[int, int] | None = None
        self.clock_reads = ClockReads(run.identity.slot)

    @property
    def _engine(self) -> Scheduler:
        opt = self._opt()
        assert opt is not None and opt._scheduler is not None
        return opt._scheduler

    def lost(self, error: Exception) -> None:
        """See `Members`."""
        if not self._cause:
            self._cause = brief(error, self.run)
            log.info(
                "slot %d: step %d mixes nothing: %s", self.run.identity.slot, self._engine.clock.steps, self._cause
            )

    def before_step(self) -> None:
        """See `Members`."""
        if self.run.left:
            raise RuntimeError(
                f"slot {self.run.identity.slot} has left its elastic run (opt.leave()): start the process again to train on"
            )
        if self._served is None:
            self.clock_reads.begin_step()
        self.run.serve()
        if self._is_over():
            record = self.go_over("begin", self._cause)
            if not self._asynchronous:
                self._begin_behind(record)

    def is_waited_for(self) -> bool:
        """See `Members`."""
        return self.run.hand.wanted or self._is_over()

    def serve(self, clock: tuple[int, int] | None) -> None:
        """See `Members`."""
        self._served = clock

    def clock_is_read(self) -> None:
        """See `Members`."""
        self.clock_reads.read()

    @property
    def _asynchronous(self) -> bool:
        """Whether members have clocks of their own."""
        return self._engine.schedule.asynchronous

    @property
    def _clock(self) -> tuple[int, int]:
        """Steps and exchanges; those of training while this rank only serves others."""
        clock = self._engine.clock
        return self._served or (clock.steps, clock.exchanges)

    def _is_over(self) -> bool:
        run, engine = self.run, self._engine
        windows, record = engine.exchanges.windows, run.record
        if windows is not None and record is not None and not self._cause:
            # Nobody waits for it, so that no exchange fails.
            self._cause = next((f"slot {record.seats[rank].slot} has ended" for rank in windows.dead()), "")
        if self._is_over_now() or self._cause:
            return True
        # A newcomer could not come in as an asynchronous member was in a call, where it may wait for the others' next thousand
        # steps. When all have met there, all are about to begin a step.
        waits = self._asynchronous and record is not None and record.passed_over and not run.met
        return run.called and not waits

    def go_over(self, at: Position, cause: str) -> Record:
        """Be a member of the next epoch, with its topology.

        Raises:
            Minority, PeerTimeout: as `Run.reform`.
        """
        run, engine = self.run, self._engine
        while True:
            try:
                record = run.reform(at, *self._clock, cause)
            except Evicted as why:
                if at != "begin":
                    raise  # In a call that the others have made without this one.
                at, cause = "join", f"slot {run.identity.slot} came back"
                self._come_back(why)
                continue
            self._cause = ""
            try:
                self._adopt(record)
                break
            except _INTERRUPTED as error:
                cause = brief(error, run)
        if at == "join":
            clock = record.clock_of(run.source) if self._asynchronous else (record.steps, record.exchanges)
            engine.clock.steps, engine.clock.exchanges = clock
        with self.clock_reads.ignored():
            run.tell()
        return record

    def _come_back(self, why: Evicted) -> None:
        """Be a newcomer with a member's parameters, states and clock. The gradients that are there are used, once, by this step.

        Raises:
            Minority: somebody else has this process' place, or all members have ended.
        """
        log.info("%s. It comes back by itself", str(why).partition(". Start it")[0])
        opt, engine, run = self._opt(), self._engine, self.run
        assert opt is not None
        run.come_back()
        self._adopt(Record(-1, (run.seat,)))
        steps = engine.clock.steps
        if not _fetch(opt, engine, run):
            raise Minority(
                f"slot {run.identity.slot}: the others have gone on without this process, and have ended"
            ) from why
        self.clock_reads.move(steps, engine.clock.steps)

    def _adopt(self, record: Record) -> None:
        opt, engine, last = self._opt(), self._engine, self._engine.phases.last
        assert opt is not None
        communicator, topology = None, None
        if len(record.seats) > 1:
            communicator = communicator_for(find_group(), engine.place, opt._options.comm_sms)
            setup = construction.setup_of(opt._family, engine.groups, opt._options, [], sharded=False)
            topology = topology_of_members(setup, opt._options.topology)
        fresh = [record.uids.index(uid) for uid in record.fresh]
        phase = dataclasses.replace(last, topology=topology, reason=last.reason or _REASON)
        engine.change_members(communicator, phase, fresh, record.exchanges)

    def _begin_behind(self, record: Record) -> None:
        """Begin the step that the others begin; one that was behind makes its own first, for itself."""
        engine = self._engine
        behind = engine.clock.steps < record.steps
        if behind:
            self._set_steps(record.steps - 1)
            engine.exchanges.skipped = engine.clock.steps
        engine.clock.exchanges = record.exchanges

    def leave(self) -> None:
        """See `Members`."""
        self.run.left = True
        self.run.record = None

    def make_again(self, call: Callable[[], R], undo: Callable[[R], object]) -> R:
        """See `comm.elastic.again.together`."""
        if self._opt() is None or self.run.left:
            return call()
        while True:
            cause = ""
            try:
                if not self._is_over_now():
                    result = call()
                    if self.run.commit():
                        return result
                    undo(result)
            except _INTERRUPTED as error:
                cause = brief(error, self.run)
            record = self.go_over("call", cause or self._cause)
            if not self._asynchronous:
                # Who was behind has nothing to make up for here: its next step is that of the others.
                self._set_steps(record.steps)
                self._engine.clock.exchanges = record.exchanges

    def _set_steps(self, steps: int) -> None:
        """The clock is that of the others."""
        self.clock_reads.move(self._engine.clock.steps, steps)
        self._engine.clock.steps = steps

    def _is_over_now(self) -> bool:
        """Whether the epoch is over for a call; newcomers wait until its end."""
        communicator = self._engine.communicator
        return bool(self.run.over) or (communicator is not None and communicator.ended is not None)

    def _write(self, path: Path) -> int:
        """Write what a newcomer needs; returns the checksum."""
        opt = self._opt()
        assert opt is not None
        tensors: dict[str, Tensor] = {}
        saved = opt.state_dict()
        saved["fusedfog"]["steps"], saved["fusedfog"]["exchanges"] = self._clock
        said = {"optimizer": saved, "tensors": _tensors(opt), "fields": _fields(opt)}
        data = encode(said, "state", tensors)
        return write(path, tensors, data).crc32


def brief(error: Exception, run: Run) -> str:
    """Why an epoch is over, for people who know slots: "slot 2 has ended"."""
    origin, record = getattr(error, "origin", None), run.record
    if origin is not None and record is not None and origin < len(record.seats):
        return f"slot {record.seats[origin].slot} {getattr(error, 'origin_words', '')}"
    return run.over or str(error).partition(" Who is where:")[0]
