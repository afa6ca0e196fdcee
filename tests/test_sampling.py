"""`fusedfog.elastic_sampler`: every sample of a pass once, whoever comes and goes. Ranks are simulated, with a sampler each."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import fusedfog
from fusedfog.sampling import ElasticSampler, Standing


@dataclass
class Process:
    """A rank with a clock and a sampler of its own."""

    uid: str
    samples: int
    options: dict[str, Any]
    steps: int = 0
    members: tuple[str, ...] = ()
    since: int = 0
    fresh: bool = False
    lag: int = 1
    drawn: deque[list[int]] = field(default_factory=deque)
    used: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.sampler = fusedfog.elastic_sampler(self.samples, self, **self.options)
        self._batches: Iterator[list[int]] = iter(())

    def standing(self) -> Standing:
        return Standing(self.steps, self.members, self.uid, self.since, self.fresh, self.lag)

    def draw(self) -> None:
        """Have the batches of the next step, and read on as a DataLoader with workers does."""
        parts, ahead = self.options.get("batches_per_step", 1), self.options.get("ahead", 0)
        while len(self.drawn) < parts * (1 + ahead):
            batch = next(self._batches, None)
            if batch is None:
                if self.drawn:
                    return
                self._batches = iter(self.sampler)
                batch = next(self._batches)
            self.drawn.append(batch)

    def step(self) -> None:
        """Train on what was drawn."""
        parts = self.options.get("batches_per_step", 1)
        batches = [self.drawn.popleft() for _ in range(parts)]
        assert all(batches)
        self.used[self.steps] = [index for batch in batches for index in batch]
        self.steps += 1


def simulate(
    passes: int, samples: int, slots: int, changes: dict[int, list[tuple[str, int]]], lag: int, **options: Any
) -> Counter[int]:
    """How often each sample counts, if at these clocks memberships begin for which members have died or come, by slot."""
    options = {"batch_size": 2, "slots": slots, **options}
    ahead = options.get("ahead", 0)
    processes = {slot: Process(f"{slot}.0", samples, options) for slot in range(slots)}
    for one in processes.values():
        one.members, one.lag = tuple(f"{slot}.0" for slot in range(slots)), lag
    ended: list[tuple[Process, int]] = []
    incarnations = dict.fromkeys(range(slots), 0)
    clock, last = 0, passes * processes[0].sampler.steps
    while clock < last:
        events = changes.get(clock, [])
        for kind, slot in events:
            if kind == "dies" and slot in processes:
                # In one of the steps before, which counts for nobody, whether it had drawn it or not.
                ended.append((processes.pop(slot), clock - lag))
        for one in processes.values():
            one.draw()
        if events:
            for kind, slot in events:
                if kind == "comes" and slot not in processes:
                    incarnations[slot] += 1
                    processes[slot] = Process(f"{slot}.{incarnations[slot]}", samples, options, fresh=True, lag=lag)
            processes = dict(sorted(processes.items()))
            members = tuple(one.uid for one in processes.values())
            for one in processes.values():
                one.steps, one.members, one.since = clock, members, clock
                one.draw()
        for one in processes.values():
            one.step()
        clock += 1
    counts: Counter[int] = Counter()
    for one, until in [*((one, last) for one in processes.values()), *ended]:
        for step, used in one.used.items():
            if step < until and not (one.fresh and step <= min(one.used) + ahead):
                counts.update(used)
    return counts


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, int, dict[int, list[tuple[str, int]]], int, int]:
    slots, ahead = draw(st.integers(2, 5)), draw(st.sampled_from([0, 0, 1, 3]))
    parts = draw(st.integers(1, 2))
    samples = draw(st.integers(30, 90)) * slots
    steps = -(-samples // (slots * 2 * parts))
    passes = draw(st.integers(1, 2))
    latest = passes * steps - (3 + ahead) * (5 + 2 * ahead) - 8  # And then what is to be dealt again has its time.
    event = st.one_of(  # One is always there: what nobody is left to know of, nobody can deal again.
        st.tuples(st.just("dies"), st.integers(1, slots - 1)), st.tuples(st.just("comes"), st.integers(1, slots - 1))
    )
    changes = draw(
        st.dictionaries(st.integers(1, max(1, latest)), st.lists(event, min_size=1, max_size=3), max_size=10)
    )
    return passes, samples, slots, changes if latest > 1 else {}, ahead, parts


@given(history=histories(), seed=st.integers(0, 3), shuffle=st.booleans(), lag=st.integers(1, 2))
@settings(max_examples=200, deadline=None)
def test_every_sample_of_a_pass_counts_once_whoever_comes_and_goes(
    history: Any, seed: int, shuffle: bool, lag: int
) -> None:
    passes, samples, slots, changes, ahead, parts = history
    counts = simulate(
        passes, samples, slots, changes, ahead=ahead, batches_per_step=parts, seed=seed, shuffle=shuffle, lag=lag
    )
    assert counts == Counter(dict.fromkeys(range(samples), passes))


@dataclass
class Alone:
    """A standing that the test sets."""

    steps: int = 0
    members: tuple[str, ...] = ("0.0", "1.0")
    own: str = "0.0"
    since: int = 0
    fresh: bool = False

    def standing(self) -> Standing:
        return Standing(self.steps, self.members, self.own, self.since, self.fresh)


def test_members_that_are_left_have_larger_batches_and_a_pass_as_many_steps() -> None:
    where = Alone(members=("0.0", "1.0", "2.0", "3.0"))
    sampler = fusedfog.elastic_sampler(64, where, batch_size=3, slots=4, shuffle=False)
    assert sampler.steps == len(sampler) == 6
    batches = iter(sampler)
    assert next(batches) == [0, 1]  # 64 samples in 6 steps are 10 or 11 for 4 ranks
    where.steps, where.members, where.since = 1, ("0.0", "2.0"), 1
    assert next(batches) == [10, 11]  # of 10..20: who came and went in step 0 is known to all of them after step 1 only
    where.steps = 2
    assert len(next(batches)) >= 11 // 2


def test_a_member_that_was_behind_makes_up_for_what_the_others_did_meanwhile() -> None:
    where = Alone()
    sampler = fusedfog.elastic_sampler(40, where, batch_size=2, slots=2, shuffle=False)
    batches = iter(sampler)
    assert next(batches) == [0, 1]
    where.steps = 1
    assert next(batches) == [4, 5]
    where.steps, where.since = 4, 4  # the others were about to begin step 4, this one has ended step 1
    assert next(batches) == [8, 9, 12, 13, 16, 17]
    where.steps = 5
    assert next(batches) == [20, 21]
    where.steps = 8  # a checkpoint was loaded: nothing was missed
    assert next(batches) == [32, 33]


def test_a_pass_begins_where_the_clock_is() -> None:
    where = Alone(steps=27)
    sampler = fusedfog.elastic_sampler(40, where, batch_size=2, slots=2, seed=5)
    assert sampler.epoch == 2
    first: list[int] = []
    for batch in sampler:
        first += batch
        where.steps += 1
    assert where.steps == 30 and sampler.epoch == 3 and len(first) == 6
    again = Alone(steps=28)
    assert first[2:4] == next(iter(fusedfog.elastic_sampler(40, again, batch_size=2, slots=2, seed=5)))
    assert first != next(iter(fusedfog.elastic_sampler(40, again, batch_size=2, slots=2, seed=6)))


def test_batches_are_not_given_out_before_their_steps() -> None:
    where = Alone()
    batches = iter(fusedfog.elastic_sampler(40, where, batch_size=2))
    next(batches)
    with pytest.raises(
        RuntimeError, match=r"batches of step 1 are asked for before step 0 was made, and ahead=0: call opt.step"
    ):
        next(batches)
    data = TensorDataset(torch.arange(40))
    where = Alone()
    seen = []
    for (batch,) in DataLoader(data, batch_sampler=fusedfog.elastic_sampler(data, where, 2, slots=2, shuffle=False)):
        seen.append(batch.tolist())
        where.steps += 1
    assert seen == [[4 * step, 4 * step + 1] for step in range(10)]


def test_one_that_was_taken_for_dead_is_a_newcomer() -> None:
    where = Alone()
    sampler = fusedfog.elastic_sampler(40, where, batch_size=2, slots=2, shuffle=False)
    next(iter(sampler))
    where.own, where.members, where.since, where.steps, where.fresh = "0.1", ("0.1", "1.0"), 6, 6, True
    batches = iter(sampler)
    assert next(batches) == [24, 25]  # for a gradient that is dropped
    where.steps = 7
    assert next(batches) == [28, 29]


def test_without_elasticity_it_shares_out_among_ranks() -> None:
    model = torch.nn.Linear(2, 1)
    opt = fusedfog.SGD(model.parameters(), lr=0.1)
    sampler = fusedfog.elastic_sampler([0] * 7, opt, batch_size=3)
    assert isinstance(sampler, ElasticSampler) and sampler.steps == 3
    drawn = []
    for batch in sampler:
        drawn += batch
        model(torch.ones(2)).backward()
        opt.step()
    assert sorted(drawn) == list(range(7)) and sampler.epoch == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"dataset": 0}, "the number of samples must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"ahead": -1}, "ahead must be at least 0"),
        ({"slots": 0}, "slots must be at least 1"),
        ({"dataset": 5, "slots": 4, "batch_size": 1}, "leave a batch without a sample"),
        ({"dataset": 10, "slots": 2, "batches_per_step": 8}, "leave a batch without a sample"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fusedfog.elastic_sampler(**{"dataset": 40, "optimizer": Alone(), "batch_size": 2, **arguments})
