"""LoRA with peft, decentralized: neighbours are sent the adapters alone; the frozen base costs neither messages nor moments.

    torchrun --standalone --nproc-per-node 2 -m fusedfog.examples.recipes.lora       (pip install peft transformers)

`model=model` makes the base equal on all ranks at construction, whatever each of them had loaded or drawn: here every rank draws
another one on purpose. The optimizer is given the adapters, as for one GPU, and `save_pretrained` inside `averaged(model)` writes
the average of all ranks' adapters, in peft's own format.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import fusedfog
from fusedfog.examples import text

CONTEXT = 64


def gpt2_with_adapters() -> nn.Module:
    """A small GPT-2 that reads bytes, its base frozen, and adapters of rank 8 at its attention."""
    config = GPT2Config(
        vocab_size=256, n_positions=CONTEXT, n_embd=64, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    adapters = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    model: nn.Module = get_peft_model(GPT2LMHeadModel(config), adapters)
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The adapters: what peft left trainable."""
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    """The mean loss of predicting each byte of the windows [batch, CONTEXT] from those before it."""
    loss: Tensor = model(input_ids=windows, labels=windows).loss
    return loss


def main(arguments: Sequence[str] | None = None) -> None:
    """Train the adapters, print what was sent, and save their average."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", default="adapters", help="folder of the averaged adapters")
    options = parser.parse_args(arguments)
    device = fusedfog.init()
    torch.manual_seed(fusedfog.rank())
    model = gpt2_with_adapters().to(device)
    adapters = trained(model)
    optimizer = fusedfog.AdamW(adapters, lr=1e-2, model=model)

    data = text.load(text.standard_library(), fusedfog.rank(), fusedfog.world_size())
    batches = text.RandomWindows(data.train, CONTEXT, seed=fusedfog.rank())
    validation = text.evenly_spaced(data.validation, 128, CONTEXT).to(device)
    losses = []
    for step in range(options.steps + 1):
        if step in (0, options.steps):
            with optimizer.averaged(model), torch.no_grad():
                losses.append(loss_of(model.eval(), validation).item())
            model.train()
        if step < options.steps:
            loss_of(model, batches.draw(8).to(device)).backward()
            optimizer.step()
            optimizer.zero_grad()
    with optimizer.averaged(model):
        if fusedfog.is_main():
            model.save_pretrained(options.out)  # type: ignore[operator]
    if fusedfog.is_main():
        whole, sent = sum(p.nbytes for p in model.parameters()), optimizer.stats()["bytes_sent"] / options.steps
        print(f"{len(adapters)} adapters, {sum(p.nbytes for p in adapters) / 1e3:.1f} kB of {whole / 1e3:.1f} kB")
        print(f"sent a step and rank: {sent / 1e3:.1f} kB; parameters with moments: {len(optimizer.state)}")
        print(f"validation loss {losses[0]:.4f} before, {losses[1]:.4f} after", flush=True)


if __name__ == "__main__":
    main()
