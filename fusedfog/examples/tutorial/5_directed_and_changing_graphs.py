# %% [markdown]
# # 5. Directed and changing graphs
#
# Real networks are not symmetric, and the cheapest graphs change in every step. What then holds, and what does not?
#
# ## One neighbour a step
#
# `one_peer_exponential` has one neighbour in each step and another one in the next. Each of its matrices is doubly
# stochastic, so
# ATC, AWC and gradient tracking work as they are, with one message instead of four:

# %%
import matplotlib.pyplot as plt
import numpy as np

from fusedfog import topology
from fusedfog.simulate import Quadratics, simulate

n, steps, lr = 16, 1500, 0.03
problem = Quadratics.random(n, 10, seed=1)
fig, ax = plt.subplots(figsize=(7, 3.6))
for name in ("ring", "exponential", "one_peer_exponential", "base_graph"):
    graph = topology.named(name, n)
    path = simulate(problem, n, graph, "atc", steps=steps, lr=lr, record_every=10)
    sends = np.mean([len(graph.round(0, k).send) for k in range(8)])
    ax.semilogy(path.steps, path.distances, label=f"{name}, {sends:.1f} messages a step")
ax.set(xlabel="step", ylabel="distance to the minimiser", title="ATC")
ax.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# ## A method that looks back needs a matrix that stays
#
# Exact diffusion and EXTRA subtract what the *same* matrix did one step ago. fusedfog refuses graphs that a method's
# theory does not
# cover, and says what to use instead:

# %%
try:
    simulate(problem, n, "one_peer_exponential", "exact_diffusion", steps=1, lr=lr)
except ValueError as error:
    print(error)

# %%
path = simulate(problem, n, "one_peer_exponential", "gradient_tracking", steps=3000, lr=lr, record_every=100)
print(f"gradient tracking on the changing graph: {path.distances[-1]:.1e}")
assert path.distances[-1] < 1e-9

# %% [markdown]
# ## Directed graphs
#
# Take an irregular directed graph. If receivers weigh all they get equally, the rows of $W$ sum to one and its columns do
# not: the
# ranks agree, but on the wrong point, the minimiser of a *weighted* loss, with the weights of $W$'s left eigenvector.

# %%
adjacency = np.zeros((6, 6))
for sender, receiver in [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 0), (0, 3), (1, 3), (2, 0)]:
    adjacency[receiver, sender] = 1
W = adjacency + np.eye(6)
W /= W.sum(1, keepdims=True)
values, vectors = np.linalg.eig(W.T)
perron = np.real(vectors[:, np.argmax(np.real(values))])
print("weight of each rank's loss:", (perron / perron.sum()).round(3))

small = Quadratics.random(6, 4, seed=2)
H, c = small.hessians.numpy(), small.linear.numpy()
x = np.zeros((6, 4))
for _ in range(8000):
    x = W @ x - 0.01 * (np.einsum("nij,nj->ni", H, x) - c)
right = small.minimiser.numpy()
p = perron / perron.sum()
wrong = np.linalg.solve(np.einsum("n,nij->ij", p, H), p @ c)
print("distance to the minimiser of the mean loss:    ", np.linalg.norm(x.mean(0) - right).round(4))
print("distance to the minimiser of the weighted loss:", np.linalg.norm(x.mean(0) - wrong).round(4))

# %% [markdown]
# **Push-sum** repairs it: senders split what they have, and a scalar tells how much of it has come. Its bias is that of
# gradient descent, small with the learning rate, and towards the right point:

# %%
graph = topology.from_matrix((adjacency + np.eye(6)) / (adjacency + np.eye(6)).sum(0), stochastic="column")
for lr in (0.03, 0.01, 0.003):
    path = simulate(small, 6, graph, "push_sum", steps=int(30 / lr), lr=lr, record_every=10**6)
    print(f"push_sum, lr {lr}: {path.mean_distances[-1]:.4f}")
assert path.mean_distances[-1] < 0.05 * np.linalg.norm(wrong - right)

# %% [markdown]
# **Exercise.** Make the graph above undirected, and give it Metropolis weights with `topology.from_networkx`. What is the
# weight of each rank's loss now?
