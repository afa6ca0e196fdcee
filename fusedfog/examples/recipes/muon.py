"""Muon for the matrices and AdamW for the rest, decentralized: any torch optimizer, wrapped.

    torchrun --standalone --nproc-per-node 2 -m fusedfog.examples.recipes.muon

`fusedfog.Decentralized` lets torch.optim.Muon (torch 2.9) make its own step, and averages its parameters with neighbours around
it: X+ = Muon(X) + (W X - X). Muon orthogonalizes each rank's own momentum, which no averaging of gradients is needed for; its
updates have a given size, so keep the learning rate of one rank. Whoever has two optimizers averages both:
`averaged(model)` of one inside that of the other.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import fusedfog
from fusedfog.examples import text
from fusedfog.examples.gpt_model import GPT, Shape, next_token_loss

SHAPE = Shape(context=64, width=64, heads=2, layers=2)


def hidden_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of the hidden layers, which are Muon's; embeddings, output and vectors, which are not."""
    named = list(model.named_parameters())
    hidden = [p for name, p in named if p.dim() == 2 and name.startswith("blocks.")]
    return hidden, [p for name, p in named if not (p.dim() == 2 and name.startswith("blocks."))]


def optimizers(model: nn.Module) -> tuple[fusedfog.Decentralized, fusedfog.AdamW]:
    """Both, decentralized. Collective."""
    hidden, rest = hidden_and_rest(model)
    muon = torch.optim.Muon(hidden, lr=4e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return fusedfog.Decentralized(muon), fusedfog.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), model=model)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, and print the loss of the average."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args(arguments)
    device = fusedfog.init()
    torch.manual_seed(0)
    model = GPT(SHAPE).to(device)
    muon, adamw = optimizers(model)
    schedules = [
        LambdaLR(one, lambda step: 0.5 * (1 + math.cos(math.pi * step / options.steps))) for one in (muon, adamw)
    ]
    data = text.load(text.standard_library(), fusedfog.rank(), fusedfog.world_size())
    batches = text.RandomWindows(data.train, SHAPE.context + 1, seed=fusedfog.rank())
    validation = text.evenly_spaced(data.validation, 128, SHAPE.context + 1).to(device)
    for step in range(1, options.steps + 1):
        next_token_loss(model, batches.draw(16).to(device)).backward()
        for one, schedule in zip((muon, adamw), schedules, strict=True):
            one.step()  # in the same order on all ranks
            one.zero_grad()
            schedule.step()
        if step % 50 == 0 or step == options.steps:
            with muon.averaged(), adamw.averaged(model), torch.no_grad():
                loss = next_token_loss(model, validation)
            if fusedfog.is_main():
                print(f"step {step}: validation loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main()
