# %% [markdown]
# # 2. Average consensus: how fast do neighbours agree?
#
# Everybody has a number, and all want the mean, but each rank talks to its neighbours only. They repeat
#
# $$x^{(k+1)} = W\, x^{(k)} .$$
#
# If $W$ is doubly stochastic and its graph is connected, all $x_i$ go to the mean. The distance to it shrinks by the factor
# $\sigma_2(W)$, the second largest singular value, in every round: a graph is judged by its **spectral gap**, and by how
# much it sends.

# %%
import matplotlib.pyplot as plt
import numpy as np

from fusedfog import topology

n = 16
start = np.random.default_rng(0).standard_normal(n)


def distances(graph: topology.Topology, rounds: int) -> list[float]:
    """Root mean square distance to the mean, after each round."""
    x, found = start.copy(), []
    for k in range(rounds + 1):
        found.append(max(float(np.sqrt(np.mean((x - start.mean()) ** 2))), 1e-17))
        x = graph.matrix(k) @ x
    return found


static = [
    topology.ring(n),
    topology.grid(n),
    topology.exponential(n),
    topology.hypercube(n),
    topology.fully_connected(n),
]
for graph in static:
    print(f"{graph.name:<18} gap {graph.spectral_gap():.3f}, sends {len(graph.round(0).send):>2} messages a round")

# %%
fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
for graph in static:
    left.semilogy(distances(graph, 40), label=graph.name)
for graph in (topology.one_peer_exponential(n), topology.base_graph(n), topology.random_matching(n, seed=0)):
    right.semilogy(distances(graph, 40), label=graph.name)
left.set(title="static graphs", xlabel="round", ylabel="distance to the mean", ylim=(1e-17, 3))
right.set(title="one neighbour a round, another one every time", xlabel="round")
left.legend()
right.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# The right picture is the surprise of the last years: with **one** message a round, `one_peer_exponential` is exact after
# $\log_2 n$ rounds, where $n$ is a power of two (Ying et al., 2021), and `base_graph` is so for every $n$ (Takezawa et
# al., 2023). The
# product of their matrices over one period is the matrix of all $1/n$:

# %%
product = np.eye(n)
for k in range(4):
    product = topology.one_peer_exponential(n).matrix(k) @ product
print("largest deviation from 1/n:", np.abs(product - 1 / n).max())
assert np.abs(product - 1 / n).max() < 1e-15

# %% [markdown]
# ## Directed graphs: push-sum
#
# On a directed graph a rank knows to how many it sends, and not what others do. It can split what it has among them:
# columns sum to one, rows do not, and the repeated average goes to a *weighted* mean. Push-sum (Kempe et al., 2003) lets a
# second
# number $w$, one at first, make the same journey, and divides:
#
# $$x^{(k+1)} = P x^{(k)}, \qquad w^{(k+1)} = P w^{(k)}, \qquad z = x / w .$$

# %%
edges = np.eye(5)
for sender, receiver in [(0, 1), (0, 2), (1, 2), (2, 3), (3, 4), (4, 0), (4, 2)]:
    edges[receiver, sender] = 1
P = edges / edges.sum(0)
x, w = np.arange(5.0), np.ones(5)
for _ in range(60):
    x, w = P @ x, P @ w
print("x     ", x.round(4))
print("x / w ", (x / w).round(4), " the mean is", np.arange(5.0).mean())
assert np.allclose(x / w, 2.0)

# %% [markdown]
# **Exercise.** How many rounds does `base_graph(n)` need until it is exact, for $n$ from 2 to 32? Compare
# `base_graph(n).period` with
# $\log_2 n$. What does `max_degree=2` change?
