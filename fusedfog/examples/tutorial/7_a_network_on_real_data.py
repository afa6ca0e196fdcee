# %% [markdown]
# # 7. A network on real data, faults included
#
# Four ranks train a small network on handwritten digits. Each sees mostly three or four of the ten digits, so none could
# learn the
# task alone. We start them from here, look at what they did, and then let things go wrong.

# %%
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

folder = Path(tempfile.mkdtemp())
torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]

script = folder / "train.py"
script.write_text(
    """
import os
import signal
import sys

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits

import fusedfog

fault, checkpoints = sys.argv[1], sys.argv[2]
device = fusedfog.init()
rank, n = fusedfog.rank(), fusedfog.world_size()
images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
images = images.float() / 16
train, test = slice(0, 1400), slice(1400, None)
mine = labels[train].argsort(stable=True).tensor_split(n)[rank]  # by label: every rank has other digits

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
method = {"algorithm": "momentum_tracking", "topology": "exponential", "nonfinite": "heal"}
opt = fusedfog.SGD(model.parameters(), lr=0.1, momentum=0.9, **method)
first = 0
if os.path.exists(checkpoints):
    first = fusedfog.load_checkpoint(checkpoints, model, opt)["step"]
torch.manual_seed(1 + rank)
with fusedfog.monitor(opt, sys.argv[3] if rank == 0 else None, every=5) as run:
    for step in range(first, 150):
        if fault == "kill" and rank == 3 and step == 90 and first == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        chosen = mine[torch.randint(len(mine), (32,))]
        loss = torch.nn.functional.cross_entropy(model(images[train][chosen]), labels[train][chosen])
        if fault == "nan" and rank == 1 and step == 60:
            loss = loss * float("nan")
        opt.zero_grad()
        loss.backward()
        run.log(loss=loss)
        opt.step()
        if fault == "kill" and (step + 1) % 50 == 0:
            fusedfog.save_checkpoint(checkpoints, model, opt, step=step + 1, keep=2)
with opt.averaged():
    right = (model(images[test]).argmax(1) == labels[test]).float().mean().item()
healed = fusedfog.mean(float(opt.stats()["healed"])) * n
if rank == 0:
    print(f"from step {first} on: accuracy of the average {right:.3f}; healed {healed:.0f} times")
dist.destroy_process_group()
"""
)


def start(fault: str) -> subprocess.CompletedProcess[str]:
    """Four ranks until they end."""
    arguments = [str(script), fault, str(folder / "checkpoints"), str(folder / f"{fault}.jsonl")]
    return subprocess.run([*torchrun, *arguments], capture_output=True, text=True)


print(start("none").stdout)

# %% [markdown]
# The method is momentum tracking, $y_i \leftarrow \sum_j W_{ij} y_j + u_i - u_i^{\text{old}}$: each rank follows the
# *mean* momentum, which
# is what ranks with different data need (page 4). `fusedfog.monitor` has recorded every rank in one file; `fusedfog watch
# FILE` shows
# it in a browser, also while training goes on. Here is its loss:


# %%
def losses(fault: str) -> dict[int, tuple[list[int], list[float]]]:
    """Rank -> (steps, losses)."""
    found: dict[int, tuple[list[int], list[float]]] = {}
    for line in (folder / f"{fault}.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["kind"] == "sample":
            steps, values = found.setdefault(record["rank"], ([], []))
            steps.append(record["step"])
            values.append(float(record["values"]["loss"]))
    return found


def show(fault: str, title: str) -> None:
    """Draw the losses of all ranks."""
    fig, ax = plt.subplots(figsize=(7, 3))
    for rank, (steps, values) in sorted(losses(fault).items()):
        ax.plot(steps, values, label=f"rank {rank}")
    ax.set(xlabel="step", ylabel="loss on its own digits", title=title)
    ax.legend()
    fig.tight_layout()
    plt.show()


show("none", "each rank sees other digits")

# %% [markdown]
# ## A rank whose numbers blow up
#
# In step 60 rank 1's loss is not a number. Its neighbours do not take over what isn't finite, and with `nonfinite="heal"`
# rank 1 takes
# the mean of its neighbours instead of its own broken parameters:

# %%
sick = start("nan")
print(sick.stdout)
assert "accuracy" in sick.stdout, sick.stderr

# %% [markdown]
# ## A rank that dies
#
# Now rank 3 is killed in step 90. The others learn of it, and say who it was. A checkpoint from step 50 is there, whole
# (it is written
# beside the last one and renamed), so the next start goes on from it:

# %%
dead = start("kill")
print("exit status", dead.returncode)
print(next((line for line in dead.stderr.splitlines() if "Error: " in line and "rank 3" in line), dead.stderr[-500:]))
again = start("kill")
print(again.stdout)
assert dead.returncode != 0
assert "from step 50 on" in again.stdout, again.stderr

# %% [markdown]
# **Exercise.** Let rank 3 be slow instead of dead (`time.sleep(0.05)` in each of its steps), and watch the run with
# `fusedfog watch`. Who
# waits for whom? Then try `algorithm="awc", asynchronous=True` with a symmetric graph (page 6).
