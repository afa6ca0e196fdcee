# %% [markdown]
# # 1. Hello, neighbours
#
# In decentralized training a **rank** (a process, usually one per GPU) talks to a few **neighbours** only. This page
# starts four ranks
# and lets each of them average one number with its neighbours.
#
# Who listens to whom, and with which weight, is a **mixing matrix** $W$: rank $i$ gives the weight $W_{ij}$ to what comes
# from rank $j$,
#
# $$x_i \leftarrow \sum_j W_{ij}\, x_j .$$
#
# Every row sums to one, so this is an average. Where every column does too ($W$ is *doubly stochastic*), the mean over all
# ranks never changes. In a **ring** every rank has two neighbours and three weights of one third:

# %%
import matplotlib.pyplot as plt
import numpy as np

import fusedfog

ring = fusedfog.topology.ring(4)
print(ring.matrix().round(3))
print("rank 0 receives", ring.round(0).recv, "and keeps", round(ring.round(0).self_weight, 3))

# %%
fig, axes = plt.subplots(1, 3, figsize=(9, 3))
graphs = (ring, fusedfog.topology.exponential(8), fusedfog.topology.grid(9))
for ax, graph in zip(axes, graphs, strict=True):
    ax.imshow(graph.matrix(), cmap="Blues", vmin=0)
    ax.set(title=f"{graph.name}, n = {graph.size}", xlabel="from rank j", ylabel="to rank i")
fig.tight_layout()
plt.show()

# %% [markdown]
# ## Four real ranks
#
# Ranks are processes. `torchrun` starts them and tells each its number; `fusedfog.init()` joins them. We write a script,
# and start
# four of them from here. `neighbor_allreduce` sends to the neighbours, receives from them, and returns the weighted sum.

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

script = Path(tempfile.mkdtemp()) / "hello.py"
script.write_text(
    """
import torch
import torch.distributed as dist
import fusedfog

fusedfog.init()
x = torch.tensor([float(fusedfog.rank())])
mixed = fusedfog.neighbor_allreduce(x, fusedfog.topology.ring(4))
everyone = [None] * 4
dist.all_gather_object(everyone, (fusedfog.rank(), x.item(), mixed.item()))
if fusedfog.is_main():
    for rank, before, after in everyone:
        print(f"rank {rank} had {before:.0f} and has {after:.3f}")
dist.destroy_process_group()
"""
)
torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
done = subprocess.run([*torchrun, str(script)], capture_output=True, text=True)
print(done.stdout or done.stderr)

# %% [markdown]
# The same by hand, for all ranks at once, with the matrix:

# %%
print(ring.matrix() @ np.arange(4.0))
assert done.stdout.count("and has") == 4

# %% [markdown]
# **Exercise.** Rank 0 now has $(3 + 0 + 1)/3$. What do the four ranks have after a second `neighbor_allreduce`, and after very
# many? Change the script, and compare with `np.linalg.matrix_power(ring.matrix(), k) @ np.arange(4.0)`.
