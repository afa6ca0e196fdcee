"""n virtual ranks in one process: the same rules, topologies and table of algorithms, without a process group.

    from fusedfog.simulate import Quadratics, simulate

    path = simulate(Quadratics.random(256, 10), 256, "exponential", "exact_diffusion", steps=1000, lr=0.01)
    path.consensus[-1], path.distances[-1]

Ranks are the rows of stacked tensors [n, N]. A step is the scheduler's: the same passes in the same order with the same
numbers, and neighbours summed in the same ascending order, so a run equals n real gloo processes bit for bit, as far as
the problem's gradients do. Exempt are sums whose order gloo chooses, `allreduce` and `global_average_every` beyond two
ranks: they differ by the rounding of one sum over the ranks. No [n, n] matrix is formed: the k-th neighbours of all ranks
are gathered at once, so a step costs degree * n * N.
"""

from fusedfog.simulate.problems import ModuleProblem, Problem, Quadratics
from fusedfog.simulate.run import Trajectory, simulate
from fusedfog.simulate.speeds import lognormal

__all__ = ["ModuleProblem", "Problem", "Quadratics", "Trajectory", "lognormal", "simulate"]
