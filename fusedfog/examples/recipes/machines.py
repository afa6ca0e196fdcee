"""Two machines of four ranks: a machine is one node of the graph, data-parallel inside, and sends its model once.

    # on each of the machines; node0 is the name of the first
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint node0:29500 -m fusedfog.examples.recipes.machines

    # on one machine that stands for two: each torchrun gets a host name of its own (as root; Linux)
    for node in node0 node1; do
        unshare --uts sh -c "hostname $node && exec torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d \\
            --rdzv-endpoint localhost:29500 --local-addr localhost -m fusedfog.examples.recipes.machines" &
    done; wait

Nothing is said about machines: `topology="auto"` finds them by their host names. `--mesh` says which ranks are a machine, for
hosts that have one name, or where something smaller than a host is to be a node. Both make the same steps.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler

import fusedfog
from fusedfog.examples.recipes.resnet import accuracy, digits, network


def machines_by_ranks(device: torch.device) -> DeviceMesh:
    """A mesh [machines, ranks of a machine]; torchrun numbers ranks machine by machine."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    shape = (fusedfog.world_size() // local, local)
    return init_device_mesh(device.type, shape, mesh_dim_names=("machines", "ranks"))


def distinct_models(model: nn.Module) -> int:
    """How many different models the ranks have, to the last bit. Collective."""
    mine = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    everyone = [torch.empty_like(mine) for _ in range(fusedfog.world_size())]
    dist.all_gather(everyone, mine)
    return len({tuple(one.tolist()) for one in everyone})


def train(epochs: int, mesh: bool, device: torch.device) -> tuple[nn.Module, fusedfog.SGD]:
    """The trained model and its optimizer, which is told which ranks are a machine, or finds out. Collective."""
    torch.manual_seed(0)
    model = network().to(device)
    optimizer = fusedfog.SGD(
        model.parameters(),
        lr=0.1,
        momentum=0.9,
        mesh=machines_by_ranks(device) if mesh else None,
        model=model,
    )
    data, _, _ = digits()
    sampler: DistributedSampler[Any] = DistributedSampler(data, drop_last=True)
    loader = DataLoader(data, batch_size=16, sampler=sampler, drop_last=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for images, labels in loader:
            cross_entropy(model(images.to(device)), labels.to(device)).backward()
            optimizer.step()  # .grad is the machine's mean here, so clipping would see it
            optimizer.zero_grad()
            schedule.step()
    return model, optimizer


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print what is a node, how many different models there are, and what was sent."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--mesh", action="store_true", help="say which ranks are a machine")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args(arguments)
    device = fusedfog.init()
    model, optimizer = train(options.epochs, options.mesh, device)
    models = distinct_models(model)
    _, images, labels = digits()
    with optimizer.averaged(model):
        right = accuracy(model, images.to(device), labels.to(device))
    if fusedfog.is_main():
        stats, size = optimizer.stats(), sum(p.nbytes for p in model.parameters())
        crossed = stats["bytes_across"] / stats["steps"]
        print(f"graph: {stats['topology']} ({stats['topology_reason']})")
        print(
            f"{fusedfog.world_size()} ranks have {models} different models; test accuracy of their average {right:.4f}"
        )
        print(
            f"between machines, a step and rank: {crossed / 1e3:.1f} kB (the model has {size / 1e3:.1f} kB)", flush=True
        )


if __name__ == "__main__":
    main()
