"""Users' own dynamic graphs, one function call per round."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from typing import SupportsFloat

from fusedfog.topology.base import Topology
from fusedfog.topology.round import SUM_TOLERANCE, Round, ascending, whole

RoundWeights = Mapping[int, Mapping[int, float]]


class FromRounds(Topology):
    """See `from_rounds`."""

    REMEMBERED = 4
    HASHED_OF_ENDLESS = 8

    def __init__(
        self, size: int, fn: Callable[[int], RoundWeights], period: int | None, doubly_stochastic: bool
    ) -> None:
        called = getattr(fn, "__qualname__", type(fn).__name__)
        super().__init__(f"from_rounds({size}, {called}, period={period})", size, period)
        self.fn = fn
        self._promised = doubly_stochastic
        self._read: dict[int, dict[int, Round]] = {}
        self._rounds(0)

    def _round(self, rank: int, step: int) -> Round:
        return self._rounds(step if self._period is None else step % self._period).get(rank) or Round(1.0, {}, {})

    def _rounds(self, step: int) -> dict[int, Round]:
        """Rounds of the ranks that send or receive at ``step``."""
        if step not in self._read:
            while len(self._read) >= self.REMEMBERED:
                del self._read[next(iter(self._read))]
            self._read[step] = self._checked(step)
        return self._read[step]

    def _checked(self, step: int) -> dict[int, Round]:
        where = f"round {step} of {self!r}"
        given = self.fn(step)
        if not isinstance(given, Mapping):
            raise ValueError(f"{where} must be {{rank: {{peer: weight}}}}, got {type(given).__name__}")
        recv: dict[int, dict[int, float]] = {}
        send: dict[int, dict[int, float]] = {}
        for rank, weights in given.items():
            receiver = self._rank(rank, where)
            if not isinstance(weights, Mapping):
                raise ValueError(f"{where}: rank {rank} must have {{peer: weight}}, got {type(weights).__name__}")
            for peer, weight in weights.items():
                sender = self._rank(peer, f"{where}, peers of rank {rank}")
                if sender == receiver:
                    raise ValueError(f"{where}: rank {rank} lists itself; its own weight is 1 minus the others")
                number = _finite(weight, f"{where}: rank {rank} weighs rank {peer}")
                if number != 0:
                    recv.setdefault(receiver, {})[sender] = number
                    send.setdefault(sender, {})[receiver] = number
        rounds = {
            rank: Round(
                1.0 - math.fsum(recv.get(rank, {}).values()),
                ascending(recv.get(rank, {})),
                ascending(send.get(rank, {})),
            )
            for rank in recv.keys() | send.keys()
        }
        if self._promised:
            self._check_columns(rounds, where)
        return rounds

    def _rank(self, rank: int, where: str) -> int:
        number = whole(rank, f"{where}: a rank", 0)
        if number >= self.size:
            raise ValueError(f"{where}: rank {number} is not one of 0..{self.size - 1}")
        return number

    def _check_columns(self, rounds: dict[int, Round], where: str) -> None:
        for rank, one in rounds.items():
            total = one.self_weight + math.fsum(one.send.values())
            if abs(total - 1) > SUM_TOLERANCE:
                raise ValueError(
                    f"{where} is not doubly stochastic as promised: column {rank} sums to {total:.8g}; the weights "
                    f"that others give rank {rank} must sum to those that it gives"
                )

    def is_row_stochastic(self) -> bool:
        """True: a rank's own weight is what the others leave."""
        return True

    def is_column_stochastic(self) -> bool:
        """As promised; else checked over the period; False for an endless sequence that was not promised."""
        return self._promised or super().is_column_stochastic()

    def _identity(self) -> bytes:
        digest = hashlib.sha256()
        for step in range(self.HASHED_OF_ENDLESS if self._period is None else self._period):
            edges = sorted((rank, *edge) for rank, one in self._rounds(step).items() for edge in one.recv.items())
            digest.update(repr((step, edges)).encode())
        return f"from_rounds:{self.size}:{self._period}:{self._promised}:{digest.hexdigest()}".encode()

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_read": {}}


def _finite(weight: SupportsFloat, who: str) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{who} with {weight!r}; a weight must be a finite number")
    return number


def from_rounds(
    n: int,
    fn: Callable[[int], RoundWeights],
    period: int | None = None,
    *,
    doubly_stochastic: bool = False,
) -> Topology:
    """A user's own dynamic graph: ``fn(step) -> {rank: {peer: weight}}``, the weights of what ``rank`` RECEIVES.

    A rank's own weight is 1 minus the sum of its peers'; a rank that is not listed receives nothing. ``fn`` must be a
    function of the step alone, equal on all ranks: a step may be asked for repeatedly and in any order. With
    ``period``, step t asks for ``fn(t % period)``. Negative weights are allowed, zero is no edge.

    Without ``period`` nobody can look at all rounds, so the sequence counts as row-stochastic only, unless
    ``doubly_stochastic=True`` promises more; the promise is checked in each round that is used. The fingerprint then
    covers the first 8 rounds.

    Raises:
        ValueError: here for round 0 and later for each round when it is first used: a rank out of range or listed by
            itself, a weight that is not finite, a broken promise; also if ``n`` or ``period`` is less than 1.
    """
    if not callable(fn):
        raise ValueError(f"fn must be a function of the step, got {fn!r}; for a list of graphs use sequence")
    if period is not None:
        period = whole(period, "period")
    return FromRounds(whole(n, "n"), fn, period, doubly_stochastic)
