# %% [markdown]
# # 8. Your own algorithm
#
# Three ways, from the quickest to the fastest.
#
# ## With operations
#
# `neighbor_allreduce` averages any tensor with the neighbours. A loop of your own needs nothing else, and runs with one
# rank (here) as
# with many (`torchrun`):

# %%
import torch

import fusedfog

x = torch.zeros(3)
for _ in range(50):
    gradient = x - torch.tensor([1.0, 2.0, 3.0])
    x = fusedfog.neighbor_allreduce(x) - 0.1 * gradient
print(x)

# %% [markdown]
# ## With any torch optimizer
#
# `Decentralized` mixes parameters around the step of any `torch.optim.Optimizer`: write the update as you would for one
# GPU. Messages
# overlap backward as fusedfog's own do.


# %%
class SignMomentum(torch.optim.Optimizer):
    """Signum (Bernstein et al., 2018): the sign of the momentum."""

    def __init__(self, params, lr=1e-3, momentum=0.9):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    m.lerp_(p.grad, 1 - group["momentum"])
                    p.sub_(m.sign(), alpha=group["lr"])


model = torch.nn.Linear(4, 1)
optimizer = fusedfog.Decentralized(SignMomentum(model.parameters(), lr=0.01), topology="ring")
for _ in range(100):
    loss = (model(torch.randn(32, 4)) - 1).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(f"loss {loss.item():.4f}")

# %% [markdown]
# ## As a rule
#
# fusedfog's own optimizers make one pass over memory: it mixes and updates together. Their updates are **rules**,
# functions of one
# element: the parameter `x`, what the neighbours make of it (`mixed`), the gradient and the states. A rule and a row of
# the table of
# algorithms make a method. Here both are added to the running process, enough for the simulator:

# %%
import matplotlib.pyplot as plt

from fusedfog.algorithm import Algorithm, Stage
from fusedfog.algorithms import TABLE
from fusedfog.kernels.reference import RULES
from fusedfog.simulate import Quadratics, simulate


def signum(x, mixed, g, states, step, hyper):
    """m = b m + (1 - b) g;  x_new = mixed - lr sign(m)"""
    lr, momentum = hyper
    m = states[0] * momentum + g * (1 - momentum)
    x_new = mixed[0] - lr * m.sign()
    return x_new, (m,), (x_new,)


RULES["signum"] = signum
numbers, states = lambda group, _: (float(group["lr"]), 0.9), lambda group: ("momentum_buffer",)
TABLE["SGD"]["signum"] = Algorithm("signum", before=None, after=Stage("signum", numbers, states))

n = 16
problem = Quadratics.random(n, 10, seed=1)
fig, ax = plt.subplots(figsize=(7, 3.4))
for name, lr in (("signum", 0.01), ("awc", 0.03)):
    path = simulate(problem, n, "one_peer_exponential", name, steps=800, lr=lambda k, lr=lr: lr * (1 - k / 800))
    ax.semilogy(path.steps, path.distances, label=name)
ax.set(xlabel="step", ylabel="distance to the minimiser")
ax.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# The sign throws away how different the ranks' gradients are, so it goes to another point: a mean of signs is not the sign
# of the
# mean. To have a rule on real ranks, write it three times, in `kernels/rules.py` (Triton), `kernels/reference.py` (torch,
# as above)
# and as an oracle in the tests, and add its row: CONTRIBUTING.md shows the diff of a real one.
#
# **Exercise.** Make it ATC: a pass `before` the exchange (your rule without mixing) and `after` it the rule "mix"
# (`from fusedfog.algorithms import MIX`). Does it end nearer?
