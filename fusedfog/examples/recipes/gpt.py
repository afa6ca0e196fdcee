"""A GPT learns Python's standard library, each rank averaging parameters with a neighbour: what ddp_gpt.py becomes.

torchrun --standalone --nproc-per-node 2 -m fusedfog.examples.recipes.gpt
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch.optim.lr_scheduler import LambdaLR

import fusedfog
from fusedfog.examples import text
from fusedfog.examples.gpt_model import GPT, Shape, next_token_loss, parameter_groups


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, print the loss now and then, and save the model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--accumulate", type=int, default=2)
    parser.add_argument("--out", default="gpt.pt")
    options = parser.parse_args(arguments)

    device = fusedfog.init()
    rank, ranks = fusedfog.rank(), fusedfog.world_size()

    shape = Shape(context=64, width=64, heads=2, layers=2)
    torch.manual_seed(0)
    model = GPT(shape).to(device)
    groups = parameter_groups(model, weight_decay=0.1)
    optimizer = fusedfog.AdamW(groups, lr=4e-3, betas=(0.9, 0.95), model=model)
    schedule = LambdaLR(
        optimizer, lambda step: min(1.0, step / 20) * 0.5 * (1 + math.cos(math.pi * step / options.steps))
    )

    data = text.load(text.standard_library(), rank, ranks)
    batches = text.RandomWindows(data.train, shape.context + 1, seed=rank)
    validation = text.evenly_spaced(data.validation, 128, shape.context + 1).to(device)
    for step in range(1, options.steps + 1):
        for _ in range(options.accumulate):
            loss = next_token_loss(model, batches.draw(8).to(device)) / options.accumulate
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            with optimizer.averaged(model), torch.no_grad():
                loss = next_token_loss(model, validation)
            if rank == 0:
                print(f"step {step}: validation loss {loss.item():.4f}", flush=True)
    optimizer.save_averaged(options.out, model)


if __name__ == "__main__":
    main()
