"""A run that goes on with another number of ranks: saved by four, resumed by two or three.

    torchrun --standalone --nproc-per-node 4 -m fusedfog.examples.recipes.resize run --until 40
    torchrun --standalone --nproc-per-node 3 -m fusedfog.examples.recipes.resize run --until 80

                                       as many ranks            another number of ranks
    parameters, momentum, buffers      each rank its own,       on all ranks the mean of what was saved, exact but for the
                                       bit for bit              rounding of a sum; what ranks differed by is gone
    learning rate, schedule, steps     bit for bit              the same
    which images a step sees           the same                 the same: a step takes `--total` images, dealt out to the
                                                                ranks there are, and the position counts images
    which of them a rank sees          the same                 others, so that the run is another one from here on

As a step sees as many images as before, the learning rate stays. Where it is the batch of a rank that stays, `--total` and the
learning rate grow with the ranks, as in data-parallel training.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fusedfog
from fusedfog.examples.recipes.resnet import accuracy, digits, network

STEPS = 80
"""Of a whole run, which the schedule ends with."""


def batch(step: int, total: int, images: int) -> Tensor:
    """Indices [total] of the images of a step, the same on all ranks and for any number of them: epoch after epoch, shuffled."""
    wanted = torch.arange(step * total, (step + 1) * total)
    epochs = torch.div(wanted, images, rounding_mode="floor")
    orders = {
        epoch: torch.randperm(images, generator=torch.Generator().manual_seed(epoch))
        for epoch in epochs.unique().tolist()
    }
    return torch.stack([orders[epoch][place] for epoch, place in zip(epochs.tolist(), wanted % images, strict=True)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Go on from the newest checkpoint in the run's folder, if it has one, and save at the end."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", help="folder of the run's checkpoints, which all ranks see")
    parser.add_argument("--until", type=int, default=STEPS, help=f"last step of this part (default {STEPS}, the run's)")
    parser.add_argument("--total", type=int, default=48, help="images of a step, over all ranks (default 48)")
    options = parser.parse_args(arguments)

    device = fusedfog.init()
    rank, ranks = fusedfog.rank(), fusedfog.world_size()
    if options.total % ranks:
        parser.error(f"--total {options.total} cannot be dealt out to {ranks} ranks")
    torch.manual_seed(0)
    model = network().to(device)
    optimizer = fusedfog.SGD(model.parameters(), lr=0.1, momentum=0.9, model=model)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    first = 0
    if fusedfog.agree(os.path.exists(options.run)):
        saved = fusedfog.load_checkpoint(options.run, model, optimizer)
        first = saved["step"]
        schedule.load_state_dict(saved["schedule"])
        distance = optimizer.consensus_distance()
        if rank == 0:
            print(f"going on after step {first}, {saved['ranks']} ranks before and {ranks} now: {distance:.2g} apart")

    data, test_images, test_labels = digits()
    for step in range(first, options.until):
        mine = batch(step, options.total, len(data)).tensor_split(ranks)[rank]
        images, labels = data[mine]
        cross_entropy(model(images.to(device)), labels.to(device)).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    fusedfog.save_checkpoint(
        options.run, model, optimizer, step=options.until, ranks=ranks, schedule=schedule.state_dict()
    )
    distance = optimizer.consensus_distance()
    with optimizer.averaged(model):
        right = accuracy(model, test_images.to(device), test_labels.to(device))
    if rank == 0:
        print(f"step {options.until}: {distance:.2g} apart, test accuracy of the average {right:.4f}", flush=True)


if __name__ == "__main__":
    main()
