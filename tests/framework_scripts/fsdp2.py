"""FSDP2 inside machines, gossip across them; between the marks is what the README shows."""

import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
blocks = [model[0]]

# README: begin
import os

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fusedfog

device = fusedfog.init()
local = int(os.environ["LOCAL_WORLD_SIZE"])
mesh = init_device_mesh(device.type, (dist.get_world_size() // local, local), mesh_dim_names=("replicate", "shard"))
for block in blocks:
    fully_shard(block, mesh=mesh["shard"])  # the shard dimension alone: gradients stay inside the machine
fully_shard(model, mesh=mesh["shard"])
optimizer = fusedfog.AdamW(model.parameters(), lr=1e-3, mesh=mesh, model=model)
# README: end
for step in range(4):
    torch.manual_seed(10 * step + dist.get_rank())
    model(torch.randn(5, 6, device=device)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
# README: begin
fusedfog.save_checkpoint("checkpoint", model, optimizer)  # a replica per machine
with optimizer.averaged(model):
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
# README: end
if dist.get_rank() == 0:
    torch.save(whole, "averaged.pt")
fusedfog.load_checkpoint("checkpoint", model, optimizer)
optimizer.drain()
dist.destroy_process_group()
