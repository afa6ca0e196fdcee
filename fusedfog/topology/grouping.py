"""Sequences of group averages that reach the exact average in finitely many rounds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from fusedfog.topology.base import Topology
from fusedfog.topology.round import Round, ascending, whole


class ExactSequence(Topology):
    """Symmetric doubly stochastic rounds whose product over one period is J."""

    def is_row_stochastic(self) -> bool:
        """True by construction."""
        return True

    def is_column_stochastic(self) -> bool:
        """True by construction."""
        return True

    def is_symmetric(self) -> bool:
        """True by construction."""
        return True

    @property
    def _exact_after(self) -> int:
        return self.finite_period("exactness")


def group_average(rank: int, group: Iterable[int]) -> Round:
    """The round in which all of ``group``, ``rank`` among them, take their average."""
    members = sorted(group)
    share = 1 / len(members)
    others = {member: share for member in members if member != rank}
    return Round(share, others, dict(others))


def machines_left(n: int, kept: Iterable[int] | None, local: int) -> tuple[int, int] | None:
    """(machines, ranks of each) of ``n`` ranks that stay, or join, where machines had ``local`` ranks; else None."""
    if kept is None:
        return (n // local, local) if n % local == 0 else None
    counts = Counter(rank // local for rank in kept)
    return (len(counts), n // len(counts)) if len(set(counts.values())) == 1 else None


class AlternatingExponentialRing(ExactSequence):
    """See `alternating_exponential_ring`."""

    def __init__(self, machines: int, local: int) -> None:
        exponents = machines.bit_length() - 1
        super().__init__(f"alternating_exponential_ring({machines}, {local})", machines * local, max(1, 2 * exponents))
        self.machines = machines
        self.local = local

    def _round(self, rank: int, step: int) -> Round:
        machine = rank // self.local
        if self.machines == 1:
            return group_average(rank, self._ranks_of(0))
        exponent, half = divmod(step % self.finite_period("a round"), 2)
        # Pairs (j, j + 2^exponent) count up in the order of j; odd ones go between machines first.
        low, high = machine % (1 << exponent), machine >> (exponent + 1)
        pair_number = high << exponent | low
        if half == pair_number % 2:
            return group_average(rank, self._ranks_of(machine))
        other = machine ^ (1 << exponent)
        return group_average(rank, [*self._ranks_of(machine), *self._ranks_of(other)])

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        left = machines_left(n, kept, self.local)
        if left is None or (kept is not None and left[0] & (left[0] - 1)):
            return super()._resized(n, kept)
        return alternating_exponential_ring(*left)

    def _ranks_of(self, machine: int) -> range:
        return range(machine * self.local, (machine + 1) * self.local)

    @property
    def max_degree(self) -> int:
        """All ranks of two machines but oneself."""
        return min(2, self.machines) * self.local - 1


def alternating_exponential_ring(machines: int, local: int) -> Topology:
    """AER (Decent-DP, ICLR 2025): pairs of machines 2^i apart average, half of them while the other half stays within.

    Period 2 log2(machines); every matrix is a symmetric projection; exact after one period from an even step (one
    step more from an odd one). One machine averages within at every step. Rank = machine * local + local rank.

    Raises:
        ValueError: if ``machines`` is not a power of two, or ``local`` not a whole number of at least 1.
    """
    machines, local = whole(machines, "machines"), whole(local, "local")
    if machines & (machines - 1):
        raise ValueError(
            f"alternating_exponential_ring needs a power of two machines, got {machines}; "
            f"base_graph({machines * local}) and inner_outer_exponential({machines}, {local}) exist for it"
        )
    return AlternatingExponentialRing(machines, local)


class _Cube:
    """k-peer hyper-hypercube: ranks as mixed-radix numbers, one digit averaged per round (Takezawa 2023, Alg. 1)."""

    def __init__(self, size: int, max_degree: int) -> None:
        self.radices: list[int] = []
        for radix in range(max_degree + 1, 1, -1):
            while size % radix == 0:
                self.radices.insert(0, radix)
                size //= radix

    def __len__(self) -> int:
        return len(self.radices)

    def group(self, member: int, step: int) -> list[int]:
        """Who averages with ``member`` in round ``step`` (taken modulo the number of rounds)."""
        if not self.radices:
            return [member]
        digit = step % len(self.radices)
        stride = math.prod(self.radices[:digit])
        first = member - member // stride % self.radices[digit] * stride
        return [first + count * stride for count in range(self.radices[digit])]


class _Block:
    """One digit of n in base k+1: ``parts`` runs of ``part`` ranks each, from ``start`` to ``end``."""

    def __init__(self, start: int, parts: int, part: int, max_degree: int) -> None:
        self.start = start
        self.parts = parts
        self.part = part
        self.end = start + parts * part
        self.cube = _Cube(parts * part, max_degree)
        self.part_cube = _Cube(part, max_degree)


class _SimpleBase:
    """Simple Base-(k+1) graph (Takezawa 2023, Alg. 2) on members 0..size-1.

    First every block averages within; then, block by block, the ranks after a block (its tail) meet its parts, each
    taking and leaving what makes the parts' means the overall mean; then the parts average within.
    """

    def __init__(self, size: int, max_degree: int) -> None:
        self.size = size
        self.max_degree = max_degree
        self.whole_cube = _Cube(size, max_degree)
        self.blocks: list[_Block] = []
        if math.prod(self.whole_cube.radices) == size:
            self.length = len(self.whole_cube)
            return
        start, part = 0, 1
        while part * (max_degree + 1) <= size:
            part *= max_degree + 1
        while start < size:
            parts = (size - start) // part
            if parts:
                self.blocks.append(_Block(start, parts, part, max_degree))
                start += parts * part
            part //= max_degree + 1
        self.within = len(self.blocks[0].cube)
        self.length = self.within + 1 + len(self.blocks[0].part_cube)

    def round(self, member: int, step: int) -> Round:
        """Round ``step`` of 0..length-1."""
        if not self.blocks:
            return group_average(member, self.whole_cube.group(member, step))
        own = next(number for number, block in enumerate(self.blocks) if member < block.end)
        block = self.blocks[own]
        last = own == len(self.blocks) - 1
        if step < self.within:
            return self._average(member, block.start, block.cube, step)
        stage = step - self.within
        if stage < own:
            return self._meet(member, stage)
        if stage == own and not last:
            return self._met(member, own)
        round_ = stage - own if last else stage - own - 1
        if block.part == 1:
            return self._average(member, block.start, block.cube, round_)
        start = member - (member - block.start) % block.part
        return self._average(member, start, block.part_cube, round_)

    def _average(self, member: int, start: int, cube: _Cube, step: int) -> Round:
        return group_average(member, (start + place for place in cube.group(member - start, step)))

    def _share(self, block: _Block) -> float:
        """How much of everyone from this block on is in the block."""
        return (block.end - block.start) / (self.size - block.start)

    def _meet(self, member: int, stage: int) -> Round:
        """A tail rank exchanges with one rank of each part of block ``stage``."""
        block = self.blocks[stage]
        share = self._share(block)
        place = member - block.end
        weights = {block.start + part * block.part + place: share / block.parts for part in range(block.parts)}
        return Round(1 - share, weights, dict(weights))

    def _met(self, member: int, own: int) -> Round:
        """A rank of the block whose turn it is meets its tail rank; those left over average among themselves."""
        block = self.blocks[own]
        tail = self.size - block.end
        part, place = divmod(member - block.start, block.part)
        if place < tail:
            weight = self._share(block) / block.parts
            return Round(1 - weight, {block.end + place: weight}, {block.end + place: weight})
        idle_per_part = block.part - tail
        number = part * idle_per_part + place - tail
        first = number - number % (self.max_degree + 1)
        chunk = range(first, min(first + self.max_degree + 1, block.parts * idle_per_part))
        return group_average(
            member, (block.start + at // idle_per_part * block.part + tail + at % idle_per_part for at in chunk)
        )


class BaseGraph(ExactSequence):
    """See `base_graph`."""

    def __init__(self, size: int, max_degree: int) -> None:
        smooth = size // _without_factors_up_to(max_degree + 1, size)
        simple = _SimpleBase(size, max_degree)
        split = _SimpleBase(size // smooth, max_degree)
        across = _Cube(smooth, max_degree)
        if simple.length < split.length + len(across):
            split, across = simple, _Cube(1, max_degree)
        super().__init__(f"base_graph({size}, max_degree={max_degree})", size, max(1, split.length + len(across)))
        self._bound = max_degree
        self._split = split
        self._across = across

    def _resized(self, n: int, kept: tuple[int, ...] | None) -> Topology:
        return base_graph(n, self._bound)

    def _round(self, rank: int, step: int) -> Round:
        step %= self.finite_period("a round")
        width = self._split.size
        group, member = divmod(rank, width)
        if step >= self._split.length:
            return group_average(
                rank, (other * width + member for other in self._across.group(group, step - self._split.length))
            )
        one = self._split.round(member, step)
        return Round(
            one.self_weight,
            ascending({group * width + peer: weight for peer, weight in one.recv.items()}),
            ascending({group * width + peer: weight for peer, weight in one.send.items()}),
        )

    @property
    def max_degree(self) -> int:
        """The bound it was made with, or less where n has only smaller factors."""
        if self._split.blocks:
            return self._bound
        return max((1, *self._split.whole_cube.radices, *self._across.radices)) - 1


def base_graph(n: int, max_degree: int = 1) -> Topology:
    """Base-(k+1) graph (Takezawa 2023), k = ``max_degree``: exact average for every n, at most k messages per round.

    A finite sequence of symmetric doubly stochastic matrices, repeated; its product is J after one period, which is
    log_{k+1} n for powers of k+1 and at most 2 log_{k+1} n + 2 rounds otherwise.

    Raises:
        ValueError: if ``n`` or ``max_degree`` is not a whole number of at least 1.
    """
    return BaseGraph(whole(n, "n"), whole(max_degree, "max_degree"))


def _without_factors_up_to(largest: int, n: int) -> int:
    for factor in range(2, largest + 1):
        while n % factor == 0:
            n //= factor
    return n
