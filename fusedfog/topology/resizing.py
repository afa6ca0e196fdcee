"""What is left of a graph when ranks leave: the rounds of a topology given weight by weight, for the ranks that stay.

A symmetric round keeps its edges among them, with Metropolis-Hastings weights. Of a directed one stays the stochastic
complement ``S = W_kk + W_kl (I - W_ll)^-1 W_lk`` (Meyer 1989; k kept, l lost): who heard a lost rank hears those that it
heard. S sums to 1 by rows or columns wherever W does, its stationary weights are those of W, and it is connected if W
is. An edge that a round has lost may be one that the others hang on. Where the rounds that are left, taken together, are
no longer connected, the mean matrix of the period takes their place, with an edge between any two ranks that a path
through lost ranks had connected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NoReturn

from fusedfog.topology.round import LONGEST_PERIOD, SUM_TOLERANCE, Round, RoundSequence, ascending

Rows = list[dict[int, float]]
"""``rows[i][j] = W[i, j]`` where it is not zero, ``W[i, i]`` included."""


def is_connected(whole: RoundSequence) -> bool:
    """Whether every rank hears every other one in the long run; True for an endless sequence, which has no end to look at."""
    if whole.period is None:
        return True
    return _joined(whole.size, (_rows(whole, step) for step in range(whole.period)))


def rounds_left(whole: RoundSequence, kept: Sequence[int]) -> list[list[Round]]:
    """One period for the ``kept`` ranks, renamed to 0..len(kept)-1: ``rounds[step][rank]``.

    Raises:
        ValueError: ``whole`` is endless, repeats only after more than 4,096 rounds, is not connected, or has a directed
            round with negative weights; see `Topology.resized`.
    """
    period = whole.period
    if period is None or period > LONGEST_PERIOD:
        how_long = "never repeats" if period is None else f"repeats only after {period} rounds"
        _refuse(whole, f"it {how_long}, so that nobody can see whether those that stay are connected; give it a period")
    all_rows = [_rows(whole, step) for step in range(period)]
    if not _joined(whole.size, all_rows):
        _refuse(whole, "its ranks do not all hear of each other, so that no graph of those that stay can make them")
    by_rows = all(map(_sums_to_one, all_rows))
    if not by_rows and not all(map(_sums_to_one, map(_transposed, all_rows))):
        _refuse(whole, "some of its rounds have rows that do not sum to 1, and others have such columns")
    for rows in all_rows:
        if any(weight < 0 for row in rows for weight in row.values()) and not _symmetric(rows):
            _refuse(whole, "it has negative weights on directed edges, which cannot be handed on to others")
    left = [_left(rows, kept, by_rows, through_lost=False) for rows in all_rows]
    if not _joined(len(kept), left):
        left = [_left(_mean(all_rows), kept, by_rows, through_lost=True)]
    return [_as_rounds(rows) for rows in left]


def _refuse(whole: RoundSequence, why: str) -> NoReturn:
    raise ValueError(f"{whole!r} cannot be resized: {why}. Topologies with a name exist for every number of ranks")


def _rows(whole: RoundSequence, step: int) -> Rows:
    rounds = [whole.round(rank, step) for rank in range(whole.size)]
    return [
        {peer: weight for peer, weight in ({rank: one.self_weight} | one.recv).items() if weight}
        for rank, one in enumerate(rounds)
    ]


def _left(rows: Rows, kept: Sequence[int], by_rows: bool, through_lost: bool) -> Rows:
    """What ``rows`` leave to the ``kept`` ranks, renamed; ``by_rows``: it is their sums that are 1, not the columns'."""
    place = {rank: number for number, rank in enumerate(kept)}
    if _symmetric(rows):
        links = _complement([dict.fromkeys(row, 1.0) for row in rows], kept) if through_lost else rows
        return _metropolis([{place[peer] for peer in links[rank] if peer in place} - {place[rank]} for rank in kept])
    reduced = _complement(rows, kept) if by_rows else _transposed(_complement(_transposed(rows), kept))
    return [{place[peer]: weight for peer, weight in reduced[rank].items()} for rank in kept]


def _metropolis(neighbors: list[set[int]]) -> Rows:
    rows: Rows = []
    for rank, near in enumerate(neighbors):
        weights = {peer: 1 / (1 + max(len(near), len(neighbors[peer]))) for peer in sorted(near)}
        rows.append({rank: 1 - math.fsum(weights.values())} | weights)
    return rows


def _complement(rows: Rows, kept: Sequence[int]) -> Rows:
    """The stochastic complement, one lost rank after the other: what i gave to it goes to those that it listened to.

    Divides by the sum of what a lost rank gives to others, never by 1 minus its own weight, so that nothing cancels
    (Grassmann, Taksar and Heyman 1985). What was given to one that listens to nobody falls to the giver itself.
    """
    rows = [dict(row) for row in rows]
    for lost in sorted(set(range(len(rows))) - set(kept)):
        heard = {peer: weight for peer, weight in rows[lost].items() if peer != lost}
        total = math.fsum(heard.values())
        rows[lost] = {}
        for rank, row in enumerate(rows):
            given = row.pop(lost, 0.0)
            for peer, weight in (heard.items() if total else [(rank, 1.0)]) if given else ():
                row[peer] = row.get(peer, 0.0) + given * weight / (total or 1.0)
    return rows


def _sums_to_one(rows: Rows) -> bool:
    return all(abs(math.fsum(row.values()) - 1) <= SUM_TOLERANCE for row in rows)


def _symmetric(rows: Rows) -> bool:
    return all(
        abs(weight - rows[peer].get(rank, 0.0)) <= SUM_TOLERANCE
        for rank, row in enumerate(rows)
        for peer, weight in row.items()
    )


def _transposed(rows: Rows) -> Rows:
    columns: Rows = [{} for _ in rows]
    for rank, row in enumerate(rows):
        for peer, weight in row.items():
            columns[peer][rank] = weight
    return columns


def _mean(all_rows: Sequence[Rows]) -> Rows:
    mean: Rows = [{} for _ in all_rows[0]]
    for rows in all_rows:
        for total, row in zip(mean, rows, strict=True):
            for peer, weight in row.items():
                total[peer] = total.get(peer, 0.0) + weight / len(all_rows)
    return mean


def _joined(size: int, all_rows: Iterable[Rows]) -> bool:
    """Whether the edges of all rounds together lead from every rank to every other."""
    heard: list[set[int]] = [set() for _ in range(size)]
    told: list[set[int]] = [set() for _ in range(size)]
    for rows in all_rows:
        for rank, row in enumerate(rows):
            heard[rank].update(row)
            for peer in row:
                told[peer].add(rank)
    return len(_reached(heard)) == len(_reached(told)) == size


def _reached(edges: list[set[int]]) -> set[int]:
    """The ranks that edges lead to from rank 0, which is one of them."""
    reached, ahead = {0}, [0]
    while ahead:
        new = edges[ahead.pop()] - reached
        reached |= new
        ahead += new
    return reached


def _as_rounds(rows: Rows) -> list[Round]:
    columns = _transposed(rows)
    return [
        Round(
            rows[rank].get(rank, 0.0),
            ascending({peer: weight for peer, weight in rows[rank].items() if peer != rank and weight}),
            ascending({peer: weight for peer, weight in columns[rank].items() if peer != rank and weight}),
        )
        for rank in range(len(rows))
    ]
