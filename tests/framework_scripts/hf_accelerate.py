"""Hugging Face accelerate; between the marks is what the README shows. Argument: "train" or "resume"."""

import sys

import torch
from by_hand import Record
from hugging_face import config, data, loss_of
from transformers import GPT2LMHeadModel

model = GPT2LMHeadModel(config)
loader = torch.utils.data.DataLoader(data, batch_size=4)
resume = sys.argv[1] == "resume"

# README: begin
from accelerate import Accelerator

from fusedfog.accelerate import prepare

accelerator = Accelerator(gradient_accumulation_steps=2, step_scheduler_with_optimizer=False)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
model, optimizer, loader, schedule = prepare(
    accelerator, model, optimizer, loader, schedule, topology="one_peer_exponential"
)
# README: end
record = Record(model, optimizer.optimizer)
if resume:
    # README: begin
    accelerator.load_state("checkpoint")
    # README: end
done = 4 if resume else 0
for number, batch in enumerate(accelerator.skip_first_batches(loader, 2 * done), 2 * done):
    if number == 8 and not resume:
        # README: begin
        accelerator.save_state("checkpoint")  # the average, and every rank's own state
        # README: end
    # README: begin
    with accelerator.accumulate(model):
        accelerator.backward(model(**batch).loss)
        if accelerator.sync_gradients:
            accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    if accelerator.sync_gradients:
        schedule.step()
    # README: end
with optimizer.gossip.averaged(model), torch.no_grad():
    model.eval()
    evaluated = loss_of(accelerator.unwrap_model(model), **torch.utils.data.default_collate(data)).item()
record.save(data, evaluated, loss_of=loss_of)
