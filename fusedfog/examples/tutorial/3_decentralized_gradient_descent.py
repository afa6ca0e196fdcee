# %% [markdown]
# # 3. Decentralized gradient descent
#
# Each rank has data of its own, and so a loss $f_i$ of its own. Together they want the minimiser $x^\star$ of $\frac1n
# \sum_i f_i$. The two
# simplest methods mix parameters, and step along the rank's own gradient:
#
# $$\text{ATC:}\quad x^{(k+1)} = W\big(x^{(k)} - \alpha \nabla f(x^{(k)})\big), \qquad
#   \text{AWC:}\quad x^{(k+1)} = W x^{(k)} - \alpha \nabla f(x^{(k)}) .$$
#
# *Adapt then combine* sends what the step has made. *Adapt while combining* sends the parameters, which are known before
# the gradient is: its message travels under forward and backward, so it costs no time. That is fusedfog's default.
#
# `fusedfog.simulate` runs the same update rules as real ranks, on virtual ranks in this one process. The problem: sixteen
# ranks, each with its own least squares problem in ten dimensions.

# %%
import itertools

import matplotlib.pyplot as plt
import numpy as np

from fusedfog.simulate import Quadratics, simulate

n = 16
problem = Quadratics.random(n, 10, seed=1)
runs = {
    (algorithm, lr): simulate(problem, n, "ring", algorithm, steps=800, lr=lr)
    for algorithm in ("awc", "atc")
    for lr in (0.1, 0.03, 0.01)
}

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
for (algorithm, lr), path in runs.items():
    ax.semilogy(path.steps, path.distances, "-" if algorithm == "awc" else "--", label=f"{algorithm}, lr {lr}")
ax.set(xlabel="step", ylabel="distance to the minimiser")
ax.legend(ncols=2)
fig.tight_layout()
plt.show()

# %% [markdown]
# They stop before $x^\star$. At the fixed point the pull of a rank's own gradient balances the pull of its neighbours: the
# **bias** is proportional to the learning rate, and grows as the graph gets sparser and the ranks' data more different.

# %%
for algorithm in ("awc", "atc"):
    found = [runs[algorithm, lr].distances[-1] for lr in (0.1, 0.03, 0.01)]
    print(
        algorithm,
        [f"{one:.4f}" for one in found],
        "ratios",
        [f"{a / b:.1f}" for a, b in itertools.pairwise(found)],
    )
graphs = ("ring", "exponential", "fully_connected")
for name in graphs:
    last = simulate(problem, n, name, "atc", steps=800, lr=0.03).distances[-1]
    print(f"atc on {name:<16} {last:.2e}")

# %% [markdown]
# So a learning rate that falls, as a cosine does, takes the bias with it, and most training ends close to consensus. (On a
# fully connected graph ATC is data-parallel training: no bias at all.)

# %%
steps = 800
path = simulate(problem, n, "ring", "awc", steps=steps, lr=lambda k: 0.1 * 0.5 * (1 + np.cos(np.pi * k / steps)))
constant = runs["awc", 0.1]
fig, ax = plt.subplots(figsize=(7, 3.4))
ax.semilogy(constant.steps, constant.distances, label="lr 0.1")
ax.semilogy(path.steps, path.distances, label="a cosine from 0.1 to 0")
ax.semilogy(path.steps, path.consensus, ":", label="distance between ranks, cosine")
ax.set(xlabel="step", ylabel="distance")
ax.legend()
fig.tight_layout()
plt.show()
assert path.distances[-1] < 0.1 * constant.distances[-1]

# %% [markdown]
# ## The same with real ranks
#
# One line of a training script changes:
#
#     optimizer = fusedfog.AdamW(model.parameters(), lr=1e-3, topology="one_peer_exponential")      # algorithm="awc"
#
# **Exercise.** AWC needs smaller steps than ATC: it is stable for $\alpha < (1 + \lambda_{\min}(W)) / L$, with the largest
# eigenvalue $L$ of the Hessians, and ATC for $\alpha < 2 / L$ (nearly). Find both limits in the simulation, on a ring.
