"""A residual network learns digits, each rank averaging parameters with a neighbour: what ddp_cnn.py becomes.

torchrun --standalone --nproc-per-node 2 -m fusedfog.examples.recipes.cnn
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

import fusedfog
from fusedfog.examples.recipes.resnet import accuracy, digits, network


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the accuracy after each epoch, and save the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--out", default="cnn.pt")
    options = parser.parse_args(arguments)

    device = fusedfog.init()
    rank = fusedfog.rank()

    torch.manual_seed(0)
    model = network().to(device)
    optimizer = fusedfog.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, model=model)

    data, test_images, test_labels = digits()
    sampler: DistributedSampler[Any] = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, batch_size=32, sampler=sampler, drop_last=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs * len(loader))
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            loss = cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with optimizer.averaged(model):
            right = accuracy(model, test_images.to(device), test_labels.to(device))
        if rank == 0:
            print(f"epoch {epoch}: test accuracy {right:.4f}", flush=True)
    optimizer.save_averaged(options.out, model)


if __name__ == "__main__":
    main()
