"""Static graphs given weight by weight: matrices and networkx graphs."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import numpy.typing as npt

from fusedfog.topology.base import Topology
from fusedfog.topology.round import SUM_TOLERANCE, Matrix, Round


class Explicit(Topology):
    """A static graph held as a list of edges; graphs with equal weights are equal, however they were made."""

    def __init__(
        self,
        maker: str,
        self_weights: npt.NDArray[np.float64],
        receivers: npt.NDArray[np.int64],
        senders: npt.NDArray[np.int64],
        weights: npt.NDArray[np.float64],
    ) -> None:
        size = len(self_weights)
        order = np.lexsort((senders, receivers))
        receivers, senders, weights = receivers[order], senders[order], weights[order]
        digest = hashlib.sha256()
        for part in (self_weights, receivers, senders, weights):
            digest.update(part.astype(part.dtype.newbyteorder("<")).tobytes())
        self._digest = digest.digest()
        super().__init__(f"{maker}(<{size} ranks, {len(weights)} edges, {self._digest.hex()[:8]}>)", size, 1)
        self._self_weights = self_weights
        self._incoming = _grouped(size, receivers, senders, weights)
        by_sender = np.lexsort((receivers, senders))
        self._outgoing = _grouped(size, senders[by_sender], receivers[by_sender], weights[by_sender])

    def _round(self, rank: int, step: int) -> Round:
        return Round(float(self._self_weights[rank]), dict(self._incoming[rank]), dict(self._outgoing[rank]))

    def _identity(self) -> bytes:
        return b"explicit" + self._digest


def from_matrix(W: npt.ArrayLike, stochastic: str = "row") -> Topology:
    """A static graph from its matrix: ``W[i, j]`` is the weight that rank i gives to what it receives from rank j.

    Zeros are no edges. Negative weights are allowed (they occur in optimised matrices) as long as the sums are right.
    Rows must sum to 1, or columns with ``stochastic="column"`` (push-sum); a matrix where both do is doubly stochastic.

    Raises:
        ValueError: if ``W`` is not square, empty, not finite, or a row (column) does not sum to 1 within 1e-6.
    """
    if stochastic not in ("row", "column"):
        raise ValueError(f'stochastic must be "row" or "column", got {stochastic!r}')
    try:
        if np.iscomplexobj(W):
            raise TypeError("it holds complex numbers")
        weights: Matrix = np.array(W, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"W is not a matrix of real numbers: {error}") from None
    if weights.ndim != 2 or weights.shape[0] != weights.shape[1] or weights.shape[0] == 0:
        raise ValueError(f"W must be a square matrix with a row for each rank, got shape {weights.shape}")
    wrong = np.argwhere(~np.isfinite(weights))
    if len(wrong):
        row, column = wrong[0]
        raise ValueError(f"W[{row}, {column}] is {weights[row, column]}; every weight must be finite")
    sums = weights.sum(axis=1 if stochastic == "row" else 0)
    check_sums(sums, stochastic, other_way=_other_way(weights, stochastic))
    self_weights = weights.diagonal().copy()
    np.fill_diagonal(weights, 0.0)
    receivers, senders = np.nonzero(weights)
    return Explicit("from_matrix", self_weights, receivers, senders, weights[receivers, senders])


def check_sums(sums: npt.NDArray[np.float64], line: str, other_way: str) -> None:
    """Refuse weights whose rows or columns (``line``) do not sum to 1, naming the worst and ``other_way`` out.

    Raises:
        ValueError: if a sum is not 1 within 1e-6.
    """
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > SUM_TOLERANCE:
        raise ValueError(f"{line} {worst} sums to {sums[worst]:.8g} instead of 1; {other_way}")


def _other_way(weights: Matrix, stochastic: str) -> str:
    other, axis = ("column", 0) if stochastic == "row" else ("row", 1)
    if np.abs(weights.sum(axis=axis) - 1).max() <= SUM_TOLERANCE:
        return f'its {other}s do: pass stochastic="{other}", or transpose it (W[i, j] is what i gives to j\'s message)'
    return f"divide each {stochastic} by its sum"


def _grouped(
    size: int, owners: npt.NDArray[np.int64], peers: npt.NDArray[np.int64], weights: npt.NDArray[np.float64]
) -> list[dict[int, float]]:
    """Per owner ``{peer: weight}``, from edges sorted by owner and then peer."""
    bounds = np.searchsorted(owners, np.arange(size + 1)).tolist()
    peer_list, weight_list = peers.tolist(), weights.tolist()
    return [
        dict(zip(peer_list[begin:end], weight_list[begin:end], strict=True))
        for begin, end in itertools.pairwise(bounds)
    ]
