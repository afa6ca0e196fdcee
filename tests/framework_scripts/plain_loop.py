"""Plain torchrun; between the marks is what the README shows. Argument: "train" or "resume"."""

import sys

import torch
from by_hand import Network, Record, tokens

data = tokens(64)
resume = sys.argv[1] == "resume"
model = Network()

# README: begin
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler

import fusedfog

device = fusedfog.init()
model = model.to(device)  # where DistributedDataParallel(model) was
optimizer = fusedfog.AdamW(model.parameters(), lr=1e-2, model=model)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)
loader = DataLoader(data, batch_size=4, sampler=DistributedSampler(data, seed=0))
done = 0
# README: end
record = Record(model, optimizer)
if resume:
    # README: begin
    done, saved = fusedfog.load_checkpoint("checkpoint", model, optimizer).values()
    schedule.load_state_dict(saved)
    # README: end
# README: begin
for step, batch in enumerate(loader):
    # README: end
    if step < done:
        continue
    # README: begin
    model(**batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step + 1 == 4:
        fusedfog.save_checkpoint("checkpoint", model, optimizer, done=step + 1, schedule=schedule.state_dict())

with optimizer.averaged(model):
    model.eval()
    evaluated = model(**torch.utils.data.default_collate(data)).item()
    if dist.get_rank() == 0:
        torch.save(model.state_dict(), "averaged.pt")
# README: end
record.save(data, evaluated, accumulate=1)
