"""That ranks which average gradients still have the same parameters, looked at every 64 steps and told a step later.

Each of them makes the same update from the same mean, so a rank that differs was edited by itself, or computes differently. Its
machine would go on with the wrong mean and hand round shards of different models, and nobody would notice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.transfer import Transfer
from fusedfog.errors import DivergedError
from fusedfog.gossip.late_read import LateRead
from fusedfog.kernels import device
from fusedfog.params.flat import FlatSegment

_EVERY = 64


class SameParameters:
    """Compares one number a rank, the sum of its parameters' bits.

    Args:
        communicator: of the ranks that average.
        members: what these ranks are called.
    """

    def __init__(self, communicator: Communicator, members: Sequence[int]) -> None:
        self._communicator, self._members = communicator, members
        self._sums = torch.zeros(len(members), dtype=torch.int64, device=communicator.device)
        self._transfer: Transfer | None = None
        self._read = LateRead()

    def look(self, segments: Iterable[FlatSegment], step: int) -> None:
        """Compare, or hear of the last comparison. Collective, once every so many steps.

        Before passes: those that mix have all ranks of a machine take the same shards, whoever's they are.

        Raises:
            DivergedError: parameters differ; names the ranks.
        """
        if self._transfer is not None:
            transfer, self._transfer = self._transfer, None
            transfer.wait()
            if device.on_gpu(self._sums):
                self._read.ask(self._sums)
            else:
                self._judge(self._sums.tolist(), step)
        for seen, _ in self._read.answers():
            self._judge(seen.tolist(), step)
        if step % _EVERY == 0:
            self._sums.zero_()
            for segment in segments:
                if segment.layout.mix:
                    self._sums[self._communicator.view.rank] += bits_of(segment.param)
            self._transfer = Transfer(self._communicator, "sums of parameters")
            self._transfer.add(partial(dist.all_reduce, self._sums, async_op=True), "comparing parameters")

    def _judge(self, sums: Sequence[int], step: int) -> None:
        if len(set(sums)) == 1:
            return
        (usual, times), *_ = Counter(sums).most_common()
        odd = [rank for rank, one in zip(self._members, sums, strict=True) if one != usual]
        who = "they differ from each other"
        if times > len(odd):
            who = f"those of rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))} differ from the others'"
        all_of_them = ", ".join(map(str, self._members))
        raise DivergedError(
            f"rank {self._members[self._communicator.view.rank]}: ranks {all_of_them} average gradients, so they must have the "
            f"same parameters, but {who} (noticed in step {step}). Edit parameters and change learning rates on all of these "
            f"ranks alike, start them from the same values (sync_init=True), or have machines average parameters instead "
            f"(inside='parameters')"
        )


def bits_of(flat: Tensor) -> Tensor:
    """The sum of a flat tensor's bits, as whole numbers: int64, 0-d."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()]
    return flat.view(whole).sum(dtype=torch.int64)
