"""Who trains on which samples, where members come and go: `elastic_sampler`.

The data is a function of the clock. A pass over the dataset, in an order that the seed and its number give, is cut into T steps
of (nearly) one global batch each, ``slots * batch_size * batches_per_step`` samples, whoever is there; the members of a step
share it out. So a pass has T steps, schedules by `opt.steps` stay what they were, and members that are left take over what
others would have had, in batches that are larger by slots / members.

Which members share out a step must be known to all of them alike, without a word between them. An epoch of the membership that
begins with clock S (in the log "from step S on") holds for data from step ``S + 1 + ahead`` on: when it begins, all have drawn
step S, and with loaders that read ahead, `ahead` steps more.

The share of a step that a member had drawn, and died before its neighbours had anything of it, is dealt again. They notice its
death in the step in which it died, or one step later where messages are sent a step ahead (algorithms without a pass before the
exchange, as awc), and are without it from clock S on: `lag` = 1 or 2 steps later. So shares of steps ``S - lag`` to ``S + ahead``
are dealt again, each ``1 + lag + ahead`` steps after its own, among those that were there both times, as a newcomer does not
know who was there before. Every sample of a pass then counts once, with these exceptions:

* a death that is noticed later loses the shares between: with `communicate_every` it is noticed by the next exchange only, and in
  a graph of long paths those that are far may have gone on by as many steps;
* a share counts twice if its owner's last message was still on its way as it died, and came: nobody can know; and so do the last
  ones of a member that ends its part by `opt.leave()`;
* shares are lost of which nobody is left who was there when they were dealt, and of steps after which training ends at once;
* a newcomer's first exchange takes its neighbours' mean and drops its own gradient: it draws samples of others for it. With
  loaders that read ahead, so it does for `ahead` steps more, which do count.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch.utils.data import Sampler

from fusedfog.comm.elastic.run import Run
from fusedfog.comm.group import find_group
from fusedfog.optim.base import DecentralizedOptimizer
from fusedfog.topology.round import whole

_PASSES_KEPT = 2
"""Orders of passes that are held: a share that is dealt again may be of the pass before."""


@dataclass(frozen=True)
class Standing:
    """What a process knows when it draws.

    Attributes:
        steps: its clock: the number of the step that it makes next.
        members: all of them, by rank.
        own: which of them it is.
        since: the clock with which this membership began.
        fresh: it has joined with this membership.
        lag: steps from that in which a member dies to the clock of the membership without it; the same for a whole run.
    """

    steps: int
    members: tuple[str, ...]
    own: str
    since: int = 0
    fresh: bool = False
    lag: int = 1


@runtime_checkable
class Standings(Protocol):
    """What tells a sampler of clock and members."""

    def standing(self) -> Standing:
        """As it is now."""
        ...


@dataclass(frozen=True)
class OfOptimizer:
    """The standing of this process with an optimizer, in an elastic run or in one whose ranks stay."""

    optimizer: DecentralizedOptimizer

    def standing(self) -> Standing:
        """See `Standings`."""
        steps, run, algorithm = self.optimizer.steps, Run.current(), self.optimizer._engine.algorithm
        if run is None or run.record is None:
            view = find_group(self.optimizer._options.group)
            return Standing(steps, tuple(map(str, range(view.size))), str(view.rank))
        record, own = run.record, run.seat.uid
        lag = 2 if algorithm.before is None and algorithm.exchanges == "parameters" else 1
        return Standing(steps, record.uids, own, record.steps, own in record.fresh, lag)


class Members:
    """The memberships that one process has seen, and the shares that follow from them. Pure.

    Args:
        samples: of the dataset.
        steps: of a pass over it.
        ahead: how many steps before its own a step is drawn at most.
        seed, shuffle: of the order.
    """

    def __init__(self, samples: int, steps: int, ahead: int, seed: int, shuffle: bool) -> None:
        self.samples, self.steps, self.ahead, self.seed, self.shuffle = samples, steps, ahead, seed, shuffle
        self._epochs: list[Standing] = []
        self._orders: dict[int, list[int]] = {}

    @property
    def _lag(self) -> int:
        return self._epochs[0].lag

    def see(self, now: Standing) -> None:
        """Take note of who is there."""
        if self._epochs and now.own != self._epochs[-1].own:
            self._epochs.clear()  # It was taken for dead, and is a newcomer itself.
        if not self._epochs or now.members != self._epochs[-1].members:
            self._epochs.append(now)

    def is_rehearsal(self, step: int) -> bool:
        """Whether this process has no share of its own yet: it does not know who was there before it came."""
        first = self._epochs[0]
        return first.fresh and step <= first.since + self.ahead

    def slice_of(self, step: int) -> list[int]:
        """The samples of a step, before they are shared out."""
        number, place = divmod(step, self.steps)
        if number not in self._orders:
            while len(self._orders) >= _PASSES_KEPT:
                del self._orders[min(self._orders)]
            self._orders[number] = self._order(number)
        return self._orders[number][place * self.samples // self.steps : (place + 1) * self.samples // self.steps]

    def _order(self, number: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.samples))
        generator = torch.Generator()
        generator.manual_seed(self.seed + number)
        found: list[int] = torch.randperm(self.samples, generator=generator).tolist()
        return found

    def _at(self, clock: int) -> Standing:
        """The membership at this clock; the first that is known for what was before it."""
        return next((epoch for epoch in reversed(self._epochs) if epoch.since <= clock), self._epochs[0])

    def _sharing(self, step: int) -> tuple[str, ...]:
        """Who shares out a step."""
        return self._at(step - 1 - self.ahead).members

    def _gone(self, step: int) -> list[str]:
        """Whose share of a step is dealt again."""
        after = self._at(step + self._lag).members
        return [one for one in self._sharing(step) if one not in after] if step >= 0 else []

    def share(self, step: int, member: str) -> list[int]:
        """What this member draws for a step."""
        members = self._sharing(step)
        found = _part(self.slice_of(step), members, member)
        period = 1 + self._lag + self.ahead
        first = before = step - period
        gone = self._gone(before)
        while self._gone(first):  # A share that is dealt again holds what its owner had been dealt again.
            first -= period
        if gone and not self.is_rehearsal(first):
            dealing = [one for one in members if one in self._sharing(first)]
            for one in gone:
                found += _part(self.share(before, one), dealing, member)
        return found


def _part(samples: list[int], members: tuple[str, ...] | list[str], member: str) -> list[int]:
    """The part of one of the members: by rank, as equal as whole numbers are; none for others."""
    if member not in members:
        return []
    rank, count = members.index(member), len(members)
    return samples[rank * len(samples) // count : (rank + 1) * len(samples) // count]


class ElasticSampler(Sampler[list[int]]):
    """Batches of indices for a `DataLoader`'s ``batch_sampler``; see `elastic_sampler`.

    Attributes:
        steps: of a pass over the dataset.
    """

    def __init__(
        self,
        samples: int,
        standings: Standings,
        batch_size: int,
        *,
        slots: int,
        batches_per_step: int,
        shuffle: bool,
        seed: int,
        ahead: int,
    ) -> None:
        self.steps = max(1, -(-samples // (slots * batch_size * batches_per_step)))
        if samples // self.steps // slots < batches_per_step:
            raise ValueError(
                f"{samples} samples in {self.steps} steps, for {slots} ranks with {batches_per_step} batches in each, leave a "
                f"batch without a sample: take a larger batch_size, or fewer batches_per_step"
            )
        self._batch_size, self._parts, self._ahead = batch_size, batches_per_step, ahead
        self._standings, self._members = standings, Members(samples, self.steps, ahead, seed, shuffle)
        self._next = 0
        self._seen: Standing | None = None
        self._left: deque[list[int]] = deque()

    @property
    def epoch(self) -> int:
        """The number of the pass that the next step belongs to."""
        return self._standings.standing().steps // self.steps

    def __len__(self) -> int:
        return self.steps * self._parts

    def __iter__(self) -> Iterator[list[int]]:
        """The batches that are left of the pass that the next step belongs to."""
        now = self._standings.standing()
        self._next = min(self._next, now.steps)
        self._left.clear()
        while self._left or self._begin_step(now.steps // self.steps):
            yield self._left.popleft()

    def _begin_step(self, number: int) -> bool:
        """Draw the next step, if it is of this pass."""
        now, before = self._standings.standing(), self._seen
        step = max(now.steps, self._next)
        if step // self.steps != number:
            return False
        if step > now.steps + self._ahead:
            raise RuntimeError(
                f"elastic_sampler: batches of step {step} are asked for before step {now.steps} was made, and "
                f"ahead={self._ahead}: call opt.step() once for every {self._parts} batch(es) (batches_per_step), and for a "
                f"DataLoader with workers pass ahead=num_workers * prefetch_factor"
            )
        self._members.see(now)
        # A member that was behind comes out of a change with the clock of the others, and makes up for the steps between.
        behind = before is not None and before.own == now.own and before.since != now.since
        drawn = [one for one in range(self._next if behind else step, step + 1) if not self._members.is_rehearsal(one)]
        mine = [index for one in drawn for index in self._members.share(one, now.own)]
        if self._members.is_rehearsal(step):
            mine = self._members.slice_of(step)[: self._batch_size * self._parts]
        self._next, self._seen = step + 1, now
        places = [part * len(mine) // self._parts for part in range(self._parts + 1)]
        self._left.extend(mine[a:b] for a, b in pairwise(places))
        return True


def elastic_sampler(
    dataset: Sized | int,
    optimizer: DecentralizedOptimizer | Standings,
    batch_size: int,
    *,
    slots: int | None = None,
    batches_per_step: int = 1,
    shuffle: bool = True,
    seed: int = 0,
    ahead: int = 0,
) -> ElasticSampler:
    """Batches such that each sample of a pass is trained on once, whoever comes and goes meanwhile.

        sampler = fusedfog.elastic_sampler(dataset, opt, batch_size=32)
        loader = DataLoader(dataset, batch_sampler=sampler)
        while sampler.epoch < 10:
            for x, y in loader: ...; opt.step()

    Batches are a function of `opt.steps`, the members and `seed`: a run that is resumed goes on where it was, and a process that
    joins begins where the others are. See the module for what is exactly promised about steps in which members die.

    Args:
        dataset: what has a length, or that length.
        optimizer: whose clock and members count; or an object with a method `standing()`, for tests.
        batch_size: samples in a batch while all are there, or one less; more when ranks are missing.
        slots: ranks of the whole run; None takes FUSEDFOG_SLOTS' number, or that of ranks.
        batches_per_step: batches for each `opt.step()`, as with gradient accumulation.
        shuffle: another order in each pass, the same on all ranks.
        seed: of that order, the same on all ranks.
        ahead: how many steps before its own a batch may be asked for: num_workers * prefetch_factor of the DataLoader, divided by
            `batches_per_step` and rounded up. Changes of members reach the data that much later.

    Raises:
        ValueError: a number that is too small; too few samples for `slots` ranks to have one in every batch; the optimizer is
            an asynchronous one of an elastic run, whose members have clocks of their own.
        RuntimeError: while iterating: a batch is asked for further ahead.
    """
    samples = whole(dataset if isinstance(dataset, int) else len(dataset), "the number of samples")
    standings, run = optimizer if isinstance(optimizer, Standings) else OfOptimizer(optimizer), Run.current()
    if isinstance(standings, OfOptimizer) and standings.optimizer._options.asynchronous and run is not None:
        raise ValueError(
            f"slot {run.identity.slot}: elastic_sampler deals out each step's samples among its members, and asynchronous "
            f"members of an elastic run make a step at different times, with others beside them: draw at random, by slot and "
            f"opt.steps, or leave out asynchronous=True"
        )
    if slots is None:
        slots = run.identity.slots if run is not None else len(standings.standing().members)
    return ElasticSampler(
        samples,
        standings,
        whole(batch_size, "batch_size"),
        slots=whole(slots, "slots"),
        batches_per_step=whole(batches_per_step, "batches_per_step"),
        shuffle=shuffle,
        seed=whole(seed, "seed", 0),
        ahead=whole(ahead, "ahead", 0),
    )
