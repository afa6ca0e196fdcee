"""BlueFog's tutorial on windows, told with `fusedfog.Window`: averages without any rank waiting for another.

    torchrun --standalone --nproc-per-node 4 -m fusedfog.examples.windows
    torchrun --standalone --nproc-per-node 4 -m fusedfog.examples.windows --straggler 0.2

1. Consensus by put: every rank writes its value into its neighbours' inboxes and mixes the newest of theirs.
2. Push-sum by accumulate: on a directed graph, where no rank knows who else sends to its receivers, values and the scalar p
   are divided among out-neighbours, and x / p is the estimate. Nothing is lost on the way, so the limit is the exact mean,
   however fast each rank goes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

import fusedfog


def consensus_by_put(x: torch.Tensor, steps: int, pause: float) -> float:
    """Average x in place; returns this rank's seconds. Ranks of different speeds come to agree, though not on the exact mean."""
    begin = time.perf_counter()
    with fusedfog.Window(x, "exponential") as window:
        for _ in range(steps):
            window.put()  # Returns once x is copied; the receivers' programs need not do anything.
            window.update()  # Local: x <- W x, with whatever the neighbours have put last.
            time.sleep(pause)
        took = time.perf_counter() - begin
        meet(window)
    return took


def mean_by_push_sum(x: torch.Tensor, steps: int, pause: float) -> tuple[torch.Tensor, float]:
    """The estimate of the mean of all ranks' x, and p, which sums to the number of ranks."""
    rank, size = fusedfog.rank(), fusedfog.world_size()
    edges = [(sender, (sender + hop) % size) for sender in range(size) for hop in (1, 2) if hop < size]
    edges += [(0, size // 2)] if size > 5 else []  # Rank 0 has one more, so that the graph is not regular.
    receivers = [receiver for sender, receiver in edges if sender == rank]
    share = 1 / (len(receivers) + 1)
    with fusedfog.Window(x, edges, zero_init=True) as window:
        for _ in range(steps):
            window.accumulate(weights=dict.fromkeys(receivers, share), self_weight=share)
            window.collect()  # Local: x and p take in all that has come.
            time.sleep(pause)
        # What is still on its way belongs to the sums. A rank that is done keeps what it gets, so all go on together.
        for _ in range(4 * size):
            meet(window)
            window.collect()
            window.accumulate(weights=dict.fromkeys(receivers, share), self_weight=share)
        meet(window)
        window.collect()
        return x / window.p, window.p


def meet(window: fusedfog.Window) -> None:
    """Wait until all that anybody has sent has arrived."""
    window.fence()
    if fusedfog.world_size() > 1:
        dist.barrier()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both, and print what they came to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100, help="of every rank (default 100)")
    parser.add_argument(
        "--straggler", type=float, default=0.0, help="seconds that rank 0 sleeps after a step (default 0)"
    )
    given = parser.parse_args(arguments)
    fusedfog.init()
    rank, size = fusedfog.rank(), fusedfog.world_size()
    mean, pause = (size - 1) / 2, given.straggler if rank == 0 else 0.001

    x = torch.full((1000,), float(rank), dtype=torch.float64)
    seconds = consensus_by_put(x, given.steps, pause)
    print(f"rank {rank}: put: {x[0]:.4f}, {given.steps} steps in {seconds:.2f} s", flush=True)

    x = torch.full((1000,), float(rank), dtype=torch.float64)
    estimate, p = mean_by_push_sum(x, given.steps, pause)
    total = fusedfog.mean(p) * size
    print(f"rank {rank}: push-sum: {estimate[0]:.9f} (the mean is {mean}), p {p:.4f}, all p {total:.12f}", flush=True)


if __name__ == "__main__":
    main()
