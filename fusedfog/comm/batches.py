"""What one message of a bucket posts at a time on NCCL; for the communicator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from fusedfog.comm.group import GroupView
from fusedfog.comm.transfer import PeerTensor

LARGEST = 256
"""Operations in one NCCL group call; with more it can hang (pytorch#174288)."""


def batches(
    view: GroupView, sends: Sequence[PeerTensor], recvs: Sequence[PeerTensor]
) -> Iterator[tuple[Sequence[PeerTensor], Sequence[PeerTensor]]]:
    """The operations of a message in batches that NCCL can take, none of them empty.

    A message of too many operations is cut by distance, (receiver - sender) mod n, at fixed distances. So both ends of an
    edge have it in the batch of the same number, or one of them has all of its operations in one: by induction over
    the numbers every batch finds its other ends posted, and none waits in a circle.
    """
    if len(sends) + len(recvs) <= LARGEST:
        if sends or recvs:
            yield sends, recvs
        return
    size, me = view.size, view.rank
    # As many to one peer on all ranks: codes and scales, or the messages of an algorithm.
    most = max(count for part in (sends, recvs) for count in Counter(peer for peer, _ in part).values() or (1,))
    span = max(1, LARGEST // (2 * most))
    for first in range(0, size, span):
        some_sends = [one for one in sends if first <= (one[0] - me) % size < first + span]
        some_recvs = [one for one in recvs if first <= (me - one[0]) % size < first + span]
        if some_sends or some_recvs:
            yield some_sends, some_recvs
