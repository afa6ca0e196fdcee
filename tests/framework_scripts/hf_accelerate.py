"""Hugging Face accelerate; between the marks is what the README shows. Argument: "train" or "resume"."""

import sys
from pathlib import Path

import torch
from by_hand import Record
from hugging_face import config, data, loss_of
from transformers import GPT2LMHeadModel

model = GPT2LMHeadModel(config)
loader = torch.utils.data.DataLoader(data, batch_size=4)
resume = sys.argv[1] == "resume"

# README: begin
from accelerate import Accelerator, DistributedDataParallelKwargs

import fusedfog

accelerator = Accelerator(
    gradient_accumulation_steps=2,
    step_scheduler_with_optimizer=False,  # or a schedule makes as many steps at a time as there are ranks
    kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
)
model, loader = accelerator.prepare(model, loader)  # before the optimizer, as it moves parameters
fusedfog.local_gradients(model)  # or DDP would average gradients
optimizer = fusedfog.AdamW(model.parameters(), lr=1e-2, model=model)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
prepared, schedule = accelerator.prepare(optimizer, schedule)
# README: end
record = Record(accelerator.unwrap_model(model), optimizer)
if resume:
    # README: begin
    accelerator.load_state("checkpoint")
    # README: end
if resume and Path("checkpoint/ranks").exists():
    # README: begin
    fusedfog.load_checkpoint("checkpoint/ranks", model, optimizer)
    # README: end
done = 4 if resume else 0
for number, batch in enumerate(accelerator.skip_first_batches(loader, 2 * done), 2 * done):
    if number == 8 and not resume:
        # README: begin
        accelerator.save_state("checkpoint")  # rank 0 alone, of which all ranks would start
        fusedfog.save_checkpoint("checkpoint/ranks", model, optimizer)  # every rank
        # README: end
    # README: begin
    with accelerator.accumulate(model):
        accelerator.backward(model(**batch).loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        prepared.step()
        prepared.zero_grad()
    if accelerator.sync_gradients:
        schedule.step()
    # README: end
with optimizer.averaged(model), torch.no_grad():
    model.eval()
    evaluated = loss_of(accelerator.unwrap_model(model), **torch.utils.data.default_collate(data)).item()
record.save(data, evaluated, loss_of=loss_of)
