"""Do all ranks mean the same exchange? Found out before data moves, by adding up three integers over all ranks.

Every rank adds a hash of each message that it expects and subtracts one of each that it sends; over all ranks that is zero
if and only if (up to 2^-80) every message has both its ends, with one operation, dtype and shape. If it is not, or a rank
has bad arguments, or has a side that only the others know, all ranks gather all reports and come to one verdict.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fusedfog.comm.communicator import Communicator
from fusedfog.errors import MismatchError
from fusedfog.ops import control

_SHOWN = 6
_HASH_BYTES = 5


@dataclass(frozen=True)
class Report:
    """What one rank is about to do.

    Attributes:
        rank: its name in errors, and in the `recv` and `send` of others.
        operation: the function called.
        tensor: dtype and shape, as far as both ends of an edge must agree on them.
        recv, send: the ranks to receive from and to send to; None if only the others know.
        problem: what is wrong with its arguments, if anything.
    """

    rank: int
    operation: str
    tensor: str
    recv: tuple[int, ...] | None
    send: tuple[int, ...] | None
    problem: str | None = None


def confer(links: Sequence[Communicator], own: Report) -> Report:
    """Compare reports with all ranks that `links` reach, one after another; returns the own one with both sides known.

    A rank that reports a problem of its own gets its report back, and raises the problem itself.

    Raises:
        MismatchError: on all ranks, naming the ranks and what differs, or the rank that had bad arguments.
        PeerTimeout, ExchangeError: a rank did not come, or has gone.
    """
    undecided = own.problem is not None or own.recv is None or own.send is None
    balance = [*_balance(own), int(undecided)]
    for communicator in links:
        balance = control.add_up(communicator, balance, f"{own.operation}, with all ranks")
    if not any(balance):
        return own
    reports = [own]
    for communicator in links:
        parts = control.gather(communicator, reports, f"{own.operation}, with all ranks")
        reports = [report for part in parts for report in part]
    reports = complete(sorted(reports, key=lambda report: report.rank))
    faults = judge(reports)
    if own.problem is not None:
        return own
    if faults:
        more = f" (and {len(faults) - _SHOWN} more)" if len(faults) > _SHOWN else ""
        raise MismatchError(f"rank {own.rank}: {own.operation}: {'; '.join(faults[:_SHOWN])}{more}")
    return next(report for report in reports if report.rank == own.rank)


def complete(reports: Sequence[Report]) -> list[Report]:
    """The reports with unknown sides filled in from what the other ranks reported."""
    return [
        replace(
            one,
            recv=tuple(o.rank for o in reports if one.rank in (o.send or ())) if one.recv is None else one.recv,
            send=tuple(o.rank for o in reports if one.rank in (o.recv or ())) if one.send is None else one.send,
        )
        for one in reports
    ]


def judge(reports: Sequence[Report]) -> list[str]:
    """Everything that is wrong between complete reports, in words; the same on every rank."""
    by_rank = {report.rank: report for report in reports}
    faults = [f"rank {one.rank} has bad arguments: {one.problem}" for one in reports if one.problem is not None]
    if faults:
        return faults
    for one in reports:
        for peer in one.recv or ():
            other = by_rank[peer]
            if one.rank not in (other.send or ()):
                faults.append(f"rank {one.rank} expects a message from rank {peer}, which does not send to it")
            elif one.operation != other.operation:
                faults.append(f"rank {one.rank} called {one.operation} but rank {peer} called {other.operation}")
            elif one.tensor != other.tensor:
                faults.append(f"rank {one.rank} has {one.tensor} but rank {peer} has {other.tensor}")
        for peer in one.send or ():
            if one.rank not in (by_rank[peer].recv or ()):
                faults.append(f"rank {one.rank} sends to rank {peer}, which does not expect a message from it")
    return faults


def _balance(own: Report) -> tuple[int, int]:
    first = second = 0
    edges = [(peer, own.rank, 1) for peer in own.recv or ()] + [(own.rank, peer, -1) for peer in own.send or ()]
    for sender, receiver, sign in edges:
        text = f"{own.operation}|{sender}|{receiver}|{own.tensor}".encode()
        digest = hashlib.blake2b(text, digest_size=2 * _HASH_BYTES).digest()
        first += sign * int.from_bytes(digest[:_HASH_BYTES])
        second += sign * int.from_bytes(digest[_HASH_BYTES:])
    return first, second
