"""Convergence figures of a topology: by FFT where every round is circulant, dense when small, sparse when large."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fusedfog.topology.round import LONGEST_PERIOD, RoundSequence, checked_step

EXACT = 1e-10
"""A product of mixing matrices this near to J is the average, up to rounding."""

LARGEST_DENSE_SPECTRUM = 2048
PROBES = 4

SUDDENLY = 1e-4
"""An exact average comes in one round; a sequence that only converges takes a steady factor per round to get there."""

Complex = npt.NDArray[np.complex128]
Real = npt.NDArray[np.float64]


class Figures:
    """The methods of `base.Topology` that return convergence figures."""

    def spectral_gap(self: RoundSequence) -> float:
        """How much of the disagreement a round removes in the long run; 1 is an exact average.

        Static graphs: 1 - |second largest eigenvalue of W|. Sequences: ``1 - rho ** (1 / period)`` with rho the
        second largest |eigenvalue| of the product of one period, the mean rate per round. Random sequences:
        ``1 - sqrt(||E[W'W] - J||)``, the rate of the expected squared distance. One rank: 1.

        Raises:
            ValueError: if the sequence is endless and has no closed form (use `consensus_factor`).
            ImportError: if scipy is missing and ``size`` needs its sparse eigenvalue solver.
        """
        if self._exact_after is not None:
            return 1.0
        return spectral_gap(self)

    def smallest_eigenvalue(self: RoundSequence) -> float:
        """Smallest eigenvalue of a static symmetric graph (exact diffusion needs it above -1/3).

        Raises:
            ValueError: if the topology is not static or not symmetric.
        """
        if not (self.is_static and self.is_symmetric()):
            raise ValueError(f"{self!r} is not static and symmetric, so it has no real smallest eigenvalue")
        return smallest_eigenvalue(self)

    def consensus_factor(self: RoundSequence, steps: int, start: int = 0) -> float:
        """``||W(start+steps-1) ... W(start) - J||_2``: the most that disagreement can shrink by, or grow, in ``steps``.

        Raises:
            ValueError: if ``steps`` is less than 1 or ``start`` is negative.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        return consensus_factor(self, checked_step(start), steps)

    def rounds_to_exact(self: RoundSequence, limit: int | None = None) -> int | None:
        """The least number of rounds from step 0 that average exactly, or None if ``limit`` rounds do not.

        ``limit`` is two periods by default, and 64 for an endless sequence.
        """
        if limit is None:
            limit = 64 if self.period is None else 2 * self.period
        known = self._exact_after
        if known is not None:
            return known if known <= limit else None
        return rounds_to_exact(self, limit)


def spectral_gap(topology: RoundSequence) -> float:
    """See `Topology.spectral_gap`."""
    period = topology.finite_period("its spectral gap")
    if period > LONGEST_PERIOD:
        raise ValueError(f"{topology!r} repeats only after {period} rounds; use consensus_factor(steps)")
    if topology.size == 1:
        return 1.0
    eigenvalues = _circulant_product(topology, 0, period)
    if eigenvalues is not None:
        rho = float(np.abs(eigenvalues[1:]).max())
    elif topology.size <= LARGEST_DENSE_SPECTRUM:
        rho = _second_of_dense(_dense_product(topology, 0, period))
    else:
        rho = _second_of_sparse(_operators(topology, 0, period))
    return 1.0 if rho < EXACT else 1.0 - float(rho ** (1 / period))


def smallest_eigenvalue(topology: RoundSequence) -> float:
    """See `Topology.smallest_eigenvalue`."""
    eigenvalues = _circulant_product(topology, 0, 1)
    if eigenvalues is not None:
        return float(eigenvalues.real.min())
    if topology.size <= LARGEST_DENSE_SPECTRUM:
        return float(np.linalg.eigvalsh(topology.matrix())[0])
    (operator,) = _operators(topology, 0, 1)
    return float(_sparse_tools().linalg.eigsh(operator, k=1, which="SA", return_eigenvectors=False)[0])


def consensus_factor(topology: RoundSequence, start: int, steps: int) -> float:
    """See `Topology.consensus_factor`."""
    n = topology.size
    if n == 1:
        return 0.0
    eigenvalues = _circulant_product(topology, start, steps)
    if eigenvalues is not None:
        return float(np.abs(eigenvalues[1:]).max())
    if n <= LARGEST_DENSE_SPECTRUM:
        return float(np.linalg.norm(_dense_product(topology, start, steps) - 1 / n, 2))
    operators = _operators(topology, start, steps)

    def forward_and_back(x: Real) -> Real:
        y = x.ravel()
        for operator in operators:
            y = operator @ y
        mean = x.mean()
        y = y - mean
        for operator in reversed(operators):
            y = operator.T @ y
        centred: Real = y - y.mean()
        return centred

    linalg = _sparse_tools().linalg
    gram = linalg.LinearOperator((n, n), matvec=forward_and_back, dtype=np.float64)
    return float(np.sqrt(max(0.0, linalg.eigsh(gram, k=1, which="LM", return_eigenvectors=False)[0])))


def rounds_to_exact(topology: RoundSequence, limit: int) -> int | None:
    """See `Topology.rounds_to_exact`.

    Random vectors stand for all vectors: only a product that equals J turns them into their means.
    """
    n = topology.size
    if n == 1:
        return 1 if limit >= 1 else None
    eigenvalues: Complex | None = np.ones(n, dtype=np.complex128)
    start: Real = np.random.default_rng(0).standard_normal((n, PROBES))
    probes, mean = start, start.mean(axis=0)
    before = 1.0
    for step in range(limit):
        fourier = topology._fourier(step) if eigenvalues is not None else None
        if eigenvalues is not None and fourier is not None:
            eigenvalues = eigenvalues * fourier
            distance = float(np.abs(eigenvalues[1:]).max())
        else:
            if eigenvalues is not None:
                for earlier in range(step):
                    probes = _operator(topology, earlier) @ probes
                eigenvalues = None
            probes = _operator(topology, step) @ probes
            distance = float(np.abs(probes - mean).max())
        if distance < EXACT and distance < SUDDENLY * before:
            return step + 1
        before = distance
    return None


def _circulant_product(topology: RoundSequence, start: int, steps: int) -> Complex | None:
    """Fourier eigenvalues of the product; None unless every round is circulant (those commute and are normal)."""
    product: Complex = np.ones(topology.size, dtype=np.complex128)
    for step in range(start, start + steps):
        fourier = topology._fourier(step)
        if fourier is None:
            return None
        product = product * fourier
    return product


def _dense_product(topology: RoundSequence, start: int, steps: int) -> Real:
    product = topology.matrix(start)
    for step in range(start + 1, start + steps):
        product = topology.matrix(step) @ product
    return product


def _second_of_dense(product: Real) -> float:
    if np.allclose(product, product.T, atol=1e-12):
        eigenvalues: npt.NDArray[Any] = np.linalg.eigvalsh(product)
    else:
        eigenvalues = np.linalg.eigvals(product)
    return float(np.sort(np.abs(eigenvalues))[-2])


def _operators(topology: RoundSequence, start: int, steps: int) -> list[Any]:
    made: dict[int, Any] = {}
    period = topology.period
    result: list[Any] = []
    for step in range(start, start + steps):
        key = step if period is None else step % period
        if key not in made:
            made[key] = _sparse_matrix(topology, step)
        result.append(made[key])
    return result


def _operator(topology: RoundSequence, step: int) -> Any:
    return topology.matrix(step) if topology.size <= LARGEST_DENSE_SPECTRUM else _sparse_matrix(topology, step)


def _sparse_matrix(topology: RoundSequence, step: int) -> Any:
    rows: list[int] = []
    columns: list[int] = []
    weights: list[float] = []
    for rank in range(topology.size):
        one = topology.round(rank, step)
        rows += [rank] * (1 + len(one.recv))
        columns += [rank, *one.recv]
        weights += [one.self_weight, *one.recv.values()]
    return _sparse_tools().csr_array((weights, (rows, columns)), shape=(topology.size, topology.size))


def _second_of_sparse(operators: list[Any]) -> float:
    linalg = _sparse_tools().linalg
    if len(operators) == 1 and abs(operators[0] - operators[0].T).max() < 1e-12:
        # Slow graphs crowd their eigenvalues at 1, where only shift-and-invert tells them apart quickly.
        largest = linalg.eigsh(operators[0].tocsc(), k=2, sigma=1 + 1e-9, return_eigenvectors=False)
        smallest = linalg.eigsh(operators[0], k=1, which="SA", return_eigenvectors=False)
        return float(max(largest.min(), -smallest[0]))

    def forward(x: Real) -> Real:
        y = x.ravel()
        for operator in operators:
            y = operator @ y
        return y

    n = operators[0].shape[0]
    product = linalg.LinearOperator((n, n), matvec=forward, dtype=np.float64)
    return float(np.sort(np.abs(linalg.eigs(product, k=2, which="LM", return_eigenvectors=False)))[-2])


def _sparse_tools() -> Any:
    try:
        import scipy.sparse
        import scipy.sparse.linalg
    except ImportError:
        raise ImportError(
            f"convergence figures of more than {LARGEST_DENSE_SPECTRUM} ranks need scipy: pip install scipy"
        ) from None
    return scipy.sparse
