"""Push-sum's scalars in the exchange that admits newcomers: their copies count nothing, and the mean is that of the others."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fusedfog.topology as topologies
from fusedfog.gossip.push_sum import PushSum
from fusedfog.topology import Topology
from fusedfog.topology.admission import Admission

AT = 7


def averaged(topology: Topology, fresh: list[int], values: np.ndarray, exchanges: int) -> tuple[np.ndarray, np.ndarray]:
    """z and the scalars after so many exchanges without updates, by each rank's own shares; with the admission before them."""
    n, z = topology.size, values.copy()
    admission = Admission(topology, fresh, AT)
    ranks = [PushSum(admission, rank) for rank in range(n)]
    for rank in ranks:
        rank.exchanges = AT
    for number in range(AT, AT + exchanges):
        shares = [rank.exchange(number) for rank in ranks]
        half = np.array([one.scale for one in shares]) * z
        if number == AT:
            half[fresh] = np.nan  # Nobody looks at it.
        z = np.array(
            [
                sum(part * half[sender] for sender, part in one.recv.items())
                + (0.0 if rank in fresh and number == AT else (one.row_sum - sum(one.recv.values())) * half[rank])
                for rank, one in enumerate(shares)
            ]
        )
        if number == AT:
            for rank in fresh:
                assert shares[rank].row_sum == pytest.approx(sum(shares[rank].recv.values()), abs=1e-15)
                assert shares[rank].row_sum == pytest.approx(1.0)
                assert shares[rank].alone == 1.0
    for one in ranks:
        np.testing.assert_array_equal(one.scalars, ranks[0].scalars)
    return z, ranks[0].scalars


@st.composite
def cases(draw: st.DrawFn) -> tuple[Topology, list[int], np.ndarray]:
    n = draw(st.integers(3, 7))
    name = draw(st.sampled_from(["star", "ring", "exponential", "one_peer_exponential", "fully_connected"]))
    fresh = draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=n - 1, unique=True))
    seed = draw(st.integers(0, 2**16))
    return topologies.named(name, n), sorted(fresh), np.random.default_rng(seed).normal(size=n)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_all_find_the_mean_of_those_that_had_values(case: tuple[Topology, list[int], np.ndarray]) -> None:
    topology, fresh, values = case
    n, mean = topology.size, np.delete(values, fresh).mean()
    values[fresh] = 1e6
    for exchanges in (1, 2, 5):
        z, scalars = averaged(topology, fresh, values, exchanges)
        assert scalars.sum() == pytest.approx(n, abs=1e-12) and (scalars > 0).all()
        assert (scalars * z).sum() / n == pytest.approx(mean, abs=1e-12)
    z, _ = averaged(topology, fresh, values, 150)
    np.testing.assert_allclose(z, mean, rtol=0, atol=1e-10)
