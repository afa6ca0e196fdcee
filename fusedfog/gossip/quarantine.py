"""Values that are not finite: passes leave them out and raise an alarm, and here the host finds out whose they were.

    a pass raises the alarm  ->  each neighbour's message is looked at  ->  counted, and the rank named, at the end of a step

On the CPU all of it happens in the step of the alarm. A GPU's alarm is read every few steps, without a wait (`LateRead`); from
then on the device looks at each message, until all have been clean for a while. So whoever is sick costs something, and a
healthy run nothing but the alarm: kernels that wrote a flag for each neighbour took a third more registers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.finite import all_finite
from fusedfog.comm.registry import leave
from fusedfog.errors import NonFiniteError, NonFiniteWarning
from fusedfog.gossip.buckets import Inbox, PassGroup
from fusedfog.gossip.delivery import ExchangeStats
from fusedfog.gossip.healing import heal
from fusedfog.gossip.late_read import LateRead
from fusedfog.kernels import device
from fusedfog.log import warn_user

_EVERY = 16
"""Steps between two looks at a GPU's alarm: a copy and an event take the host 10 us."""

_WATCH = 32
"""Steps for which messages are looked at after the last one that was not finite."""


class Quarantine:
    """What one rank does about values that are not finite.

    Args:
        messages: names of the flat tensors that travel.
        heals: whether this rank's own values are replaced by the neighbours'.
        conserves: the name of an algorithm whose sums over ranks must be conserved; it ends where it would have to leave
            values out.

    Attributes:
        alarm: 16 bytes on the device, zeros until something is not finite.
        watching: for how many steps more a GPU looks at every message.
        warned: the ranks that have been named.
    """

    def __init__(
        self,
        communicator: Communicator,
        place: torch.device,
        messages: tuple[str, ...],
        stats: ExchangeStats,
        *,
        heals: bool = False,
        conserves: str | None = None,
    ) -> None:
        self.communicator, self.messages, self.stats = communicator, messages, stats
        self.heals, self.conserves = heals, conserves
        self.alarm = torch.zeros(16, dtype=torch.uint8, device=place)
        self.watching = 0
        self._alarms = {torch.uint8: self.alarm}
        self._every = 1 if heals or conserves else _EVERY
        self._step = 0
        self._seen: set[int] = set()
        self.warned: set[int] = set()
        self._told: deque[int] = deque()
        self._alarm_read, self._verdicts_read, self._flags_read = LateRead(), LateRead(), LateRead()
        self._verdicts: list[tuple[tuple[int, ...], Tensor]] = []

    @property
    def rank(self) -> int:
        """This rank."""
        return self.communicator.view.rank

    def alarm_for(self, param: Tensor) -> Tensor:
        """The alarm, as passes over these parameters want it."""
        if param.dtype not in self._alarms:
            self._alarms[param.dtype] = self.alarm.view(param.dtype)
        return self._alarms[param.dtype]

    def before_pass(self, pass_group: PassGroup, inbox: Inbox) -> bool:
        """Heal this rank, if it is to be, before a pass mixes what has come; whether it may have been healed."""
        if (
            not self.heals
            or not inbox.weights
            or inbox.numbers is not None
            or (device.on_gpu(self.alarm) and not self.watching)
        ):
            return False
        healed = heal(pass_group, self.messages, inbox)
        self.stats.healed += healed
        return healed

    def after_pass(self, pass_group: PassGroup, inbox: Inbox) -> None:
        """After a pass, and before anybody sends again: whose values were left out?"""
        if not inbox.ranks or inbox.channels:
            return
        if device.on_gpu(self.alarm):
            if self.watching:
                self._verdicts.append((self._tellers(inbox), self._verdict(pass_group, inbox)))
        elif self.alarm.any():
            self.alarm.zero_()
            self._convict(self._tellers(inbox), self._verdict(pass_group, inbox).tolist())

    def before_overwriting(self, pass_group: PassGroup, inbox: Inbox) -> None:
        """The same before a pass that writes its results into the inbox."""
        if device.on_gpu(self.alarm):
            self.after_pass(pass_group, inbox)
            return
        self.alarm.zero_()
        if inbox.ranks and not all(all_finite(one[pass_group.whole]) for message in inbox.tensors for one in message):
            self._convict(self._tellers(inbox), self._verdict(pass_group, inbox).tolist())

    def refuse(self, ranks: Iterable[int]) -> None:
        """These ranks' values were left out of an average; from any thread."""
        self._told.extend(ranks)

    def refuse_late(self, flags: Tensor, ranks: Sequence[int]) -> None:
        """The same on a GPU, of those of `ranks` whose column in flags [messages, ranks] is not all ones."""
        self._flags_read.ask(flags, ranks)

    def _tellers(self, inbox: Inbox) -> tuple[int, ...]:
        return (self.rank, *(rank for rank, weight in zip(inbox.ranks, inbox.weights, strict=True) if weight))

    def _verdict(self, pass_group: PassGroup, inbox: Inbox) -> Tensor:
        """bool [1 + neighbours], whether something of this rank's and of each neighbour's is not finite."""
        here, segment = pass_group.whole, pass_group.segment
        own = [segment.tensor(name)[here] for name in self.messages]
        theirs = [[message[k][here] for message in inbox.tensors] for k, weight in enumerate(inbox.weights) if weight]
        return torch.stack([torch.stack([~one.isfinite().all() for one in sent]).any() for sent in (own, *theirs)])

    def _convict(self, ranks: Sequence[int], verdict: Sequence[bool]) -> None:
        if verdict[0]:
            # What came may have been spoilt by an edit of this rank's own: it blames nobody.
            self._seen |= {self.rank} if self.conserves else set()
        else:
            self._seen |= {rank for rank, bad in zip(ranks, verdict, strict=True) if bad}

    def end_step(self, step: int) -> None:
        """Count what the step has brought, name who is new, and ask a GPU what it has seen.

        Raises:
            NonFiniteError: values had to be left out of sums that must be conserved.
        """
        self._step = step
        if device.on_gpu(self.alarm):
            self._read_alarm()
        while self._told:
            self._seen.add(self._told.popleft())
        if self._seen:
            found, self._seen = sorted(self._seen), set()
            self._report(found)

    def _read_alarm(self) -> None:
        for seen, _ in self._alarm_read.answers():
            if seen.any():
                self.watching = _WATCH
        for seen, members in self._verdicts_read.answers():
            verdict = seen.tolist()
            if any(verdict):
                self.watching = _WATCH
            for ranks in members:
                self._convict(ranks, verdict[: len(ranks)])
                verdict = verdict[len(ranks) :]
        for seen, ranks in self._flags_read.answers():
            self.refuse(rank for rank, fine in zip(ranks, seen.min(0).tolist(), strict=True) if not fine)
        if self._verdicts:
            members, verdicts = zip(*self._verdicts, strict=True)
            self._verdicts_read.ask(torch.cat(verdicts), members)
            self._verdicts.clear()
        self.watching = max(0, self.watching - 1)
        if (self._step + 1) % self._every == 0:
            self._alarm_read.ask(self.alarm)
            self.alarm.zero_()

    def _report(self, ranks: Sequence[int]) -> None:
        self.stats.refused += len(ranks)
        for rank in ranks:
            self.stats.refused_from[rank] = self.stats.refused_from.get(rank, 0) + 1
        if self.conserves is not None:
            self._raise(ranks)
        for rank in ranks:
            if rank not in self.warned:
                self.warned.add(rank)
                warn_user(self._words(rank), NonFiniteWarning)

    def _words(self, rank: int) -> str:
        at, more = f"(step {self._step})", "Said once; stats()['refused_from'] counts on"
        if rank == self.rank:
            return f"rank {rank}: its own values are not finite {at}, and other ranks leave them out. {more}"
        return (
            f"rank {self.rank}: values from rank {rank} are not finite {at} and left out, until rank {rank} sends finite ones "
            f"again: this rank's own count in their place, or in averages those of the others. Look at rank {rank}'s loss and "
            f"gradients; nonfinite='skip' makes no update from gradients that are not finite, and 'heal' also brings such a rank "
            f"back. {more}"
        )

    def _raise(self, ranks: Sequence[int]) -> None:
        whose = " and ".join("its own values" if rank == self.rank else f"values from rank {rank}" for rank in ranks)
        error = NonFiniteError(
            f"rank {self.rank}: {whose} are not finite (step {self._step}), and algorithm {self.conserves!r} cannot leave them "
            f"out: its sums over ranks must be conserved. Parameters of other ranks are finite still; go back to a checkpoint, "
            f"with a lower learning rate, clipping or nonfinite='skip', or use algorithm='awc', which can leave values out"
        )
        leave(self.communicator, self._step + 1, error)
        raise error
