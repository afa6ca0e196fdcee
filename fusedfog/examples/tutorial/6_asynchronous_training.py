# %% [markdown]
# # 6. Asynchronous training
#
# So far every rank waits in every step for its neighbours' messages of the same step. If one machine is three times slower, all
# ranks soon go at its pace. **One-sided** communication lets them go on: a rank writes into its neighbours' memory
# whenever it has
# something new, and mixes what it finds in its own.
#
# Two rules make that exact. **AWC** gives the weight $W_{ij}$ to the *newest* value of neighbour $j$, and uses it again
# until a newer one
# comes:
#
# $$x_i \leftarrow W_{ii}\, x_i + \sum_j W_{ij}\, \tilde x_j - \alpha \nabla f_i(x_i) .$$
#
# Where it comes to rest, every $\tilde x_j$ is $x_j$: the limit does not depend on anybody's speed. (Mixing a value only
# once, as older
# systems do, moves it towards what the fast ranks minimise.) The simulator runs this in virtual time: `speeds` are steps in
# a unit of time.

# %%
import matplotlib.pyplot as plt

from fusedfog.simulate import Quadratics, simulate

n = 8
problem = Quadratics.random(n, 10, seed=1)
speeds = {"all alike": [1.0] * n, "rank 0 three times slower": [1 / 3] + [1.0] * (n - 1)}
fig, ax = plt.subplots(figsize=(7, 3.6))
for name, speed in speeds.items():
    path = simulate(problem, n, "ring", "awc", steps=1200, lr=0.03, speeds=speed, record_every=10)
    ax.semilogy(path.steps, path.distances, label=f"{name}: {sum(path.rank_steps[-1])} steps in all")
    print(f"{name:<28} ends {path.distances[-1]:.6f} from the minimiser")
synchronous = simulate(problem, n, "ring", "awc", steps=400, lr=0.03, record_every=10)
times = [3 * step for step in synchronous.steps]
ax.semilogy(times, synchronous.distances, "--", label=f"synchronous, at the slow rank's pace: {400 * n} steps")
ax.set(xlabel="time, in steps of a fast rank", ylabel="distance to the minimiser")
ax.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# **Push-sum** works on any directed graph. A rank sends shares of its mass with its values; whoever receives mixes by
# mass. A slow rank
# has collected more mass by the time it steps, so all losses count alike. Mass is never lost and never doubled:

# %%
edges = "exponential"
path = simulate(problem, n, edges, "push_sum", steps=1500, lr=0.003, speeds=speeds["rank 0 three times slower"])
print("masses of the ranks  ", [round(mass, 3) for mass in path.masses])
print("with what is under way", sum(path.masses) + path.mass_under_way)
assert abs(sum(path.masses) + path.mass_under_way - n) < 1e-10

# %% [markdown]
# ## With real ranks
#
# `asynchronous=True` is all that an optimizer needs. Ranks then make different numbers of steps; `uneven()` lets all end
# together.
# Here rank 0 sleeps in every step, and the others take no notice:

# %%
import subprocess
import sys
import tempfile
from pathlib import Path

script = Path(tempfile.mkdtemp()) / "uneven.py"
script.write_text(
    """
import time
import torch
import fusedfog

fusedfog.init()
torch.manual_seed(fusedfog.rank())
model = torch.nn.Linear(8, 1)
opt = fusedfog.SGD(model.parameters(), lr=0.05, topology="ring", asynchronous=True)
target = torch.arange(8.0)
end = time.monotonic() + 2
with opt.uneven():
    while time.monotonic() < end:
        x = torch.randn(32, 8)
        loss = (model(x).squeeze() - x @ target).square().mean()
        opt.zero_grad(); loss.backward(); opt.step()
        time.sleep(0.06 if fusedfog.rank() == 0 else 0.02)
with opt.averaged():
    error = (model.weight.squeeze() - target).norm().item()
if fusedfog.is_main():
    print("steps of each rank", opt.stats()["rank_steps"])
    print(f"error of the average {error:.4f}")
"""
)
torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
done = subprocess.run([*torchrun, str(script)], capture_output=True, text=True)
print(done.stdout or done.stderr)
assert "steps of each rank" in done.stdout

# %% [markdown]
# **Exercise.** `max_lag=10` bounds how far a rank may run ahead. What does it do to the numbers of steps above? When would
# you want it?
# BlueFog's window operations themselves (`put`, `accumulate`, `get`) are in `fusedfog.Window`; `fusedfog.examples.windows`
# uses them.
