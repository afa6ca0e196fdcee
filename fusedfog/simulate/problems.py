"""What simulated ranks minimise: one loss per rank, as quadratics or as a module on every rank's data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn


class Problem(Protocol):
    """What `simulate` minimises: one loss per rank.

    Optional attributes, looked up by name: `loss(X) -> Tensor` (its mean is recorded), `minimiser` [N],
    `grad_of(step, ranks, X)`, the gradients [k, N] of k ranks at the rows of X [k, N] (or else `grad` is asked for all, where
    ranks step at different times), `weighted(parts) -> Problem`, whose losses are this one's times `parts` [n], `dim` (N) and
    `start()` -> [N] or [n, N] for `x0=None`, and `sizes`, the numbers of elements of the parameters that a row consists
    of (only quasi-global Adam, which takes a norm over the flat buffer, has bits that depend on it).
    """

    def grad(self, step: int, X: Tensor) -> Tensor:
        """Gradients [n, N] at step `step` (from 0), row i being that of rank i's loss at X[i]; leaves X alone."""


@dataclass(frozen=True)
class Quadratics:
    """f_i(x) = x'H_i x / 2 - c_i'x on rank i; the gradient may carry fresh N(0, noise^2) at every step.

    Attributes:
        hessians: H [n, d, d], symmetric. linear: c [n, d].
        noise, seed: the noise is a function of (seed, step) alone.
    """

    hessians: Tensor
    linear: Tensor
    noise: float = 0.0
    seed: int = 0

    @staticmethod
    def random(n: int, d: int, samples: int | None = None, *, spread: float = 1.0, seed: int = 0) -> Quadratics:
        """n least-squares losses ||A_i x - b_i||^2 / (2 m) with m samples each (2 d by default), float64.

        b_i = A_i target_i + 0.1 noise; A_i and noise are standard normal, targets normal times `spread` (0: all ranks
        share one, and nearly one minimiser).
        """
        m, rng = samples or 2 * d, np.random.default_rng(seed)
        a = rng.standard_normal((n, m, d))
        targets = spread * rng.standard_normal((n, d))
        b = np.einsum("nmd,nd->nm", a, targets) + 0.1 * rng.standard_normal((n, m))
        hessians, linear = np.einsum("nmi,nmj->nij", a, a) / m, np.einsum("nmi,nm->ni", a, b) / m
        return Quadratics(torch.from_numpy(hessians), torch.from_numpy(linear))

    def weighted(self, parts: Sequence[float]) -> Quadratics:
        """The problem with rank i's loss times parts[i], n p_i to have sum_i p_i f_i as its mean loss; noise stays as it is."""
        column = torch.tensor(parts, dtype=self.linear.dtype)[:, None]
        return replace(self, hessians=self.hessians * column[:, :, None], linear=self.linear * column)

    @property
    def dim(self) -> int:
        """d."""
        return self.linear.shape[1]

    @cached_property
    def minimiser(self) -> Tensor:
        """Of the mean loss: [d]."""
        return cast(Tensor, torch.linalg.solve(self.hessians.mean(0), self.linear.mean(0)))

    def grad(self, step: int, X: Tensor) -> Tensor:
        """H_i x_i - c_i, and noise: [n, d]."""
        exact = torch.einsum("nij,nj->ni", self.hessians.to(X.dtype), X) - self.linear.to(X.dtype)
        return exact + self._noise_at(step, X.dtype) if self.noise else exact

    def grad_of(self, step: int, ranks: Sequence[int], X: Tensor) -> Tensor:
        """The same for some ranks, at the rows of X [k, d]."""
        own = [*ranks]
        exact = torch.einsum("nij,nj->ni", self.hessians[own].to(X.dtype), X) - self.linear[own].to(X.dtype)
        return exact + self._noise_at(step, X.dtype)[own] if self.noise else exact

    def _noise_at(self, step: int, dtype: torch.dtype) -> Tensor:
        source = torch.Generator().manual_seed(self.seed * 2**32 + step)
        return self.noise * torch.randn(self.linear.shape, generator=source, dtype=dtype)

    def loss(self, X: Tensor) -> Tensor:
        """The mean loss at the mean of the rows: 0-d."""
        x = X.double().mean(0)
        return 0.5 * x @ self.hessians.mean(0) @ x - self.linear.mean(0) @ x


class ModuleProblem:
    """Each rank trains its own copy of a module on its own data, all copies in one batched pass (torch.func).

    Args:
        module: gives the architecture and the start; not changed. Its buffers are constants, so layers that write them
            in forward (BatchNorm in training) raise.
        loss: (module's output, targets) -> 0-d loss, the mean over the batch.
        data: one (inputs [m_i, ...], targets [m_i, ...]) per rank; ranks may hold different amounts.
        batch: samples per rank and step, drawn with replacement as a function of (seed, step); None takes all of them,
            which needs equal amounts.

    Raises:
        ValueError: no data for some rank, or batch=None with unequal amounts.
    """

    def __init__(
        self,
        module: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        data: Sequence[tuple[Tensor, Tensor]],
        *,
        batch: int | None = None,
        seed: int = 0,
    ) -> None:
        counts = [len(inputs) for inputs, _ in data]
        if not counts or min(counts) == 0:
            raise ValueError(f"every rank needs data, got {counts} samples")
        if batch is None and len(set(counts)) > 1:
            raise ValueError(f"ranks hold {min(counts)} to {max(counts)} samples: choose a batch size")
        self.module, self.criterion, self.batch, self.seed = module, loss, batch, seed
        self.inputs, self.targets = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
        self.counts = torch.tensor(counts)
        self._first = (self.counts.cumsum(0) - self.counts)[:, None]
        self._shapes = {name: p.shape for name, p in module.named_parameters()}
        self.sizes = tuple(p.numel() for p in module.parameters())
        self._gradients: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.func.vmap(
            torch.func.grad(self._loss_of_row), randomness="different"
        )

    def start(self) -> Tensor:
        """The module's parameters, flat: [N]."""
        return torch.cat([p.detach().reshape(-1) for p in self.module.parameters()])

    def indices(self, step: int) -> Tensor:
        """Which samples each rank sees at a step: [n, batch], indices into `inputs` and `targets`."""
        if self.batch is None:
            return self._first + torch.arange(int(self.counts[0]))
        source = torch.Generator().manual_seed(self.seed * 2**32 + step)
        draws = torch.rand(len(self.counts), self.batch, generator=source, dtype=torch.float64)
        return self._first + (draws * self.counts[:, None]).long()

    def grad(self, step: int, X: Tensor) -> Tensor:
        """Gradients of every rank's loss on its batch: [n, N]."""
        return self.grad_of(step, range(len(self.counts)), X)

    def grad_of(self, step: int, ranks: Sequence[int], X: Tensor) -> Tensor:
        """The same for some ranks, at the rows of X [k, N]."""
        chosen = self.indices(step)[[*ranks]]
        return self._gradients(X, self.inputs[chosen], self.targets[chosen])

    @torch.no_grad()
    def loss(self, X: Tensor) -> Tensor:
        """The loss of the mean of the rows on all ranks' data: 0-d."""
        return self._loss_of_row(X.mean(0), self.inputs, self.targets)

    def predict(self, row: Tensor, inputs: Tensor) -> Tensor:
        """The module's output with flat parameters `row` [N]."""
        pieces = zip(self._shapes.items(), row.split(self.sizes), strict=True)
        named = {name: piece.view(shape) for (name, shape), piece in pieces}
        inputs = inputs.to(row.dtype) if inputs.is_floating_point() else inputs
        return cast(Tensor, torch.func.functional_call(self.module, named, (inputs,)))

    def _loss_of_row(self, row: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return self.criterion(self.predict(row, inputs), targets)
