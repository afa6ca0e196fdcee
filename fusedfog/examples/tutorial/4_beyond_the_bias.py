# %% [markdown]
# # 4. Beyond the bias
#
# With a constant learning rate, ATC and AWC stop at a distance proportional to it. Three ideas remove that, and a fourth
# repairs
# what momentum does.
#
# **Exact diffusion** (Yuan et al., 2019; also D², NIDS) corrects each step by the last one:
#
# $$\psi^{(k+1)} = x^{(k)} - \alpha \nabla f(x^{(k)}), \qquad
#   x^{(k+1)} = \bar W \big( \psi^{(k+1)} + x^{(k)} - \psi^{(k)} \big), \qquad \bar W = \tfrac12 (I + W).$$
#
# **EXTRA** (Shi et al., 2015) is its AWC form: it needs nothing but parameters, so its message overlaps the whole iteration.
#
# **Gradient tracking** sends a second quantity: each rank tracks the mean gradient,
#
# $$y^{(k+1)} = W y^{(k)} + \nabla f(x^{(k+1)}) - \nabla f(x^{(k)}), \qquad x^{(k+1)} = W x^{(k)} - \alpha\, y^{(k)} .$$
#
# It costs twice the bytes, and works on graphs that change.

# %%
import matplotlib.pyplot as plt

from fusedfog.simulate import Quadratics, simulate

n, steps, lr = 16, 2000, 0.03
problem = Quadratics.random(n, 10, seed=1)
methods = ("awc", "atc", "exact_diffusion", "extra", "gradient_tracking")
paths = {name: simulate(problem, n, "ring", name, steps=steps, lr=lr, record_every=10) for name in methods}

# %%
fig, ax = plt.subplots(figsize=(7, 3.8))
for name, path in paths.items():
    ax.semilogy(path.steps, path.distances, label=name)
ax.set(xlabel="step", ylabel="distance to the minimiser", title=f"ring of {n}, constant lr {lr}")
ax.legend()
fig.tight_layout()
plt.show()
for name, path in paths.items():
    print(f"{name:<18}{path.distances[-1]:.1e}")
assert max(paths[name].distances[-1] for name in methods[2:]) < 1e-10 < paths["atc"].distances[-1]

# %% [markdown]
# ## Momentum makes the bias worse
#
# With heavy-ball momentum $\beta$ a method moves as far as one with the rate $\alpha / (1 - \beta)$, and has the bias of
# that rate too.
# **DecentLaM** (Yuan et al., 2021) gives momentum the *corrected* gradient: the speed of momentum, and the bias of ATC
# without it at the
# small rate $\alpha$.

# %%
small = 0.1 * lr
runs = {
    "atc, momentum 0.9": simulate(problem, n, "ring", "atc", steps=1500, lr=small, momentum=0.9, record_every=10),
    "decentlam, momentum 0.9": simulate(
        problem, n, "ring", "decentlam", steps=1500, lr=small, momentum=0.9, record_every=10
    ),
    "atc, no momentum": simulate(problem, n, "ring", "atc", steps=5000, lr=small, record_every=10),
}
for name, path in runs.items():
    print(f"{name:<24} lr {small:.3f}: distance {path.distances[-1]:.3f}")
assert runs["decentlam, momentum 0.9"].distances[-1] < 0.3 * runs["atc, momentum 0.9"].distances[-1]

# %% [markdown]
# ## Noise
#
# Deep learning has noisy gradients, and with noise there is a floor that no correction removes. What it removes is the
# part of the
# bias that comes from *different data*. Here ranks have problems that are more and more different, and every gradient is noisy:

# %%
spreads = (0.0, 0.3, 1.0, 3.0)
fig, ax = plt.subplots(figsize=(7, 3.4))
for name in ("atc", "exact_diffusion", "gradient_tracking"):
    ends = []
    for spread in spreads:
        noisy = Quadratics.random(n, 10, spread=spread, seed=1)
        noisy = Quadratics(noisy.hessians, noisy.linear, noise=0.3)
        tail = simulate(noisy, n, "ring", name, steps=600, lr=lr, record_every=10).distances[-20:]
        ends.append(sum(tail) / len(tail))
    ax.plot(spreads, ends, "o-", label=name)
ax.set(xlabel="how different the ranks' data are", ylabel="distance in the end", title="with gradient noise")
ax.legend()
fig.tight_layout()
plt.show()

# %% [markdown]
# **Exercise.** `exact_diffusion` refuses `topology="one_peer_exponential"`. Read its message, then try `gradient_tracking`
# there.
# How does `communicate_every=4` change the end point of `atc`, at equal bytes?
