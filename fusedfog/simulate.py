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

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from fusedfog import optim
from fusedfog.algorithms import Algorithm, Outer, Stage, algorithm_for, check_options, resolve_topology
from fusedfog.construction import Keywords, Options, check_finite
from fusedfog.kernels.reference import RULES
from fusedfog.layout import ALIGN
from fusedfog.push_sum import idle, push
from fusedfog.rhythm import Clock, Rhythm
from fusedfog.topology import Round, Topology

__all__ = ["ModuleProblem", "Problem", "Quadratics", "Trajectory", "simulate"]

Rate: TypeAlias = float | Callable[[int], float]
Mix: TypeAlias = Callable[[Tensor], Tensor]
OptimizerName: TypeAlias = Literal["SGD", "Adam", "AdamW", "AccumAdamW"]


class Problem(Protocol):
    """What `simulate` minimises: one loss per rank.

    Optional attributes, looked up by name: `loss(X) -> Tensor` (its mean is recorded), `minimiser` [N], `dim` (N) and
    `start()` -> [N] or [n, N] for `x0=None`, and `sizes`, the numbers of elements of the parameters that a row consists
    of (only quasi-global Adam, which takes a norm over the flat buffer, has bits that depend on it).
    """

    def grad(self, step: int, X: Tensor) -> Tensor:
        """Gradients [n, N] at step `step` (from 0), row i being that of rank i's loss at X[i]; leaves X alone."""


@dataclass
class Trajectory:
    """What a run recorded: one entry of each list per recorded step, and the end.

    Attributes:
        steps: how many steps had been made.
        losses: mean of the problem's `loss`, if it has one.
        distances, mean_distances: root mean square over ranks of ||x_i - x*||, and ||mean - x*||, if x* is known.
        consensus: root mean square over ranks of ||x_i - mean||.
        X: final parameters [n, N].
        states: the algorithm's final states by name, each [n, N].
    """

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    mean_distances: list[float] = field(default_factory=list)
    consensus: list[float] = field(default_factory=list)
    X: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    states: dict[str, Tensor] = field(default_factory=dict)


def simulate(
    problem: Problem,
    n: int,
    topology: Topology | str | None = None,
    algorithm: str = "awc",
    *,
    optimizer: OptimizerName = "SGD",
    steps: int,
    lr: Rate,
    x0: Tensor | np.ndarray | None = None,
    communicate_every: int = 1,
    global_average_every: int | None = None,
    outer: Outer | None = None,
    record_every: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    **hyper: Any,
) -> Trajectory:
    """Train `problem` on n virtual ranks with one of fusedfog's optimizers.

    Args:
        problem: see `Problem`.
        n: number of ranks.
        topology, algorithm, communicate_every, global_average_every, outer: as for the optimizers.
        optimizer: the name of the optimizer class.
        steps: how many steps to make.
        lr: learning rate, or a function of the step (from 0).
        x0: the start [n, N], or [N] for all ranks alike. None asks the problem's `start`, else draws one standard normal
            row for all ranks from `seed`.
        record_every: record after every so many steps; the start and the end are always recorded.
        dtype: of parameters and arithmetic, float64 or float32.
        hyper: the optimizer's own arguments: momentum, weight_decay, betas, ...

    Returns:
        The `Trajectory`.

    Raises:
        ValueError: whatever the optimizers refuse at construction, with their words; shapes that do not fit.
        TypeError: unknown hyper-parameters.
    """
    if n < 1 or steps < 0 or record_every < 1:
        raise ValueError(f"need n >= 1, steps >= 0, record_every >= 1; got {n}, {steps}, {record_every}")
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"dtype must be torch.float64 or torch.float32, which are the arithmetic's, got {dtype}")
    rate = lr if callable(lr) else (lambda step: lr)
    keywords = Keywords(
        topology=topology,
        algorithm=algorithm,
        communicate_every=communicate_every,
        global_average_every=global_average_every,
        outer=outer,
    )
    family, group = _group(optimizer, rate(0), hyper)
    row, graph, rhythm = _resolve(keywords, family, group, n)
    x = _start(problem, n, x0, seed, dtype)
    ranks = _Ranks(row, graph, rhythm, group, x, getattr(problem, "sizes", x.shape[1:]))
    path = Trajectory()
    for step in range(steps):
        if step % record_every == 0:
            _record(path, problem, step, ranks.flat["param"])
        group["lr"] = float(rate(step))
        check_finite(group, ("lr",))
        ranks.step(problem.grad(step, ranks.flat["param"]))
    _record(path, problem, steps, ranks.flat["param"])
    path.X, path.states = ranks.flat["param"], {name: ranks.flat[name] for name in ranks.state_names}
    return path


def _group(optimizer: str, lr: float, hyper: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The optimizer's family and its param group, checked and defaulted by the optimizer itself, built for one rank."""
    faces: dict[str, Any] = {face.__name__: face for face in (optim.SGD, optim.Adam, optim.AdamW, optim.AccumAdamW)}
    if optimizer not in faces:
        raise ValueError(f"unknown optimizer {optimizer!r}; there are {', '.join(faces)}")
    foreign = [name for name in hyper if name in Keywords.__annotations__]
    if foreign:
        raise TypeError(f"{', '.join(foreign)} means nothing to simulated ranks")
    face = faces[optimizer]([nn.Parameter(torch.zeros(1))], lr=lr, algorithm="local", **hyper)
    return face._family, face.param_groups[0]


def _resolve(
    keywords: Keywords, family: str, group: dict[str, Any], n: int
) -> tuple[Algorithm, Topology | None, Rhythm]:
    """What `construction.build` decides for n real ranks."""
    options = Options.of(keywords)
    row = algorithm_for(options.algorithm, family, options.outer)
    check_options(row, {**group, **vars(options)})
    graph = resolve_topology(row, options.topology, n)
    if n == 1:
        row, graph = algorithm_for("local", family), None
    every = options.outer.every if options.outer is not None else options.communicate_every
    return row, graph, Rhythm(every, options.global_average_every)


def _start(problem: Problem, n: int, x0: Tensor | np.ndarray | None, seed: int, dtype: torch.dtype) -> Tensor:
    if x0 is None and hasattr(problem, "start"):
        x0 = problem.start()
    elif x0 is None and hasattr(problem, "dim"):
        x0 = torch.randn(problem.dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    elif x0 is None:
        raise ValueError("pass x0, or a problem that has `dim` or `start()`")
    x = torch.as_tensor(x0).detach()
    if x.ndim not in (1, 2) or (x.ndim == 2 and x.shape[0] != n):
        raise ValueError(f"x0 must be [N] or [n, N] with n = {n}, got {tuple(x.shape)}")
    return x.expand(n, -1).to(dtype, copy=True).contiguous()


def _record(path: Trajectory, problem: Problem, step: int, x: Tensor) -> None:
    wide = x.double()
    mean = wide.mean(0)
    path.steps.append(step)
    path.consensus.append(float((wide - mean).norm()) / len(x) ** 0.5)
    if hasattr(problem, "loss"):
        path.losses.append(float(problem.loss(x).double().mean()))
    if hasattr(problem, "minimiser"):
        path.distances.append(float((wide - problem.minimiser).norm()) / len(x) ** 0.5)
        path.mean_distances.append(float((mean - problem.minimiser).norm()))


# -- one step of all ranks -------------------------------------------------------------------------------------------

_Slot: TypeAlias = tuple[Tensor | None, Tensor, Tensor]
"""The k-th neighbours: receivers [R] (None for all ranks) take weights [R, 1] of what senders [R] sent."""


@dataclass(frozen=True)
class _Mixing:
    """One exchange of all ranks; rows that have no k-th neighbour are not touched by slot k."""

    slots: tuple[_Slot, ...] = ()
    row_sum: Tensor | float | None = None

    def __call__(self, base: Tensor) -> Tensor:
        """`kernels.reference.mix_messages` of every rank: the same operations in the same order, row by row."""
        mixed = base if self.row_sum is None else base * self.row_sum
        for receivers, senders, weights in self.slots:
            if receivers is None:
                mixed = (base[senders] - base).mul_(weights).add_(mixed)
            else:
                part = (base[senders] - base[receivers]).mul_(weights).add_(mixed[receivers])
                mixed = mixed.index_copy(0, receivers, part)
        return mixed


def _everyone(base: Tensor) -> Tensor:
    """A full average as an exchange with weight one."""
    return (_mean(base) - base).add_(base)


def _mean(rows: Tensor) -> Tensor:
    """Row by row: torch's own sum picks its order by shape."""
    total = torch.zeros_like(rows[0])
    for row in rows * (1.0 / len(rows)):
        total += row
    return total


def _slots(received: Sequence[Mapping[int, float]], dtype: torch.dtype) -> tuple[_Slot, ...]:
    """From each rank's {neighbour: weight}, ascending, to slots; neighbours of weight zero are skipped."""
    lists = [[(peer, weight) for peer, weight in weights.items() if weight] for weights in received]
    slots = []
    for k in range(max(map(len, lists), default=0)):
        rows = [rank for rank, peers in enumerate(lists) if len(peers) > k]
        senders = torch.tensor([lists[rank][k][0] for rank in rows])
        weights = torch.tensor([[lists[rank][k][1]] for rank in rows], dtype=dtype)
        slots.append((None if len(rows) == len(lists) else torch.tensor(rows), senders, weights))
    return tuple(slots)


class _Ranks:
    """n ranks on their way through steps: the scheduler's clock and order of passes, on stacked tensors.

    Attributes:
        flat: [n, N] tensors by the table's names: "param", states, "message". scalars: push-sum's, float64 [n].
    """

    def __init__(
        self, row: Algorithm, topology: Topology | None, rhythm: Rhythm, group: dict[str, Any], x: Tensor, sizes: Any
    ) -> None:
        self.row, self.topology, self.rhythm, self.group = row, topology, rhythm, group
        self.state_names = row.state_names(group)
        self.flat = {"param": x} | {name: torch.zeros_like(x) for name in self.state_names}
        if row.after.rule == "outer":
            self.flat["outer_param"].copy_(x)
        self.scalars = np.ones(len(x))
        self.clock, self.updates = Clock(), 0
        self._sizes = tuple(sizes)
        self._rounds: dict[int, list[Round]] = {}
        self._mixings: dict[int, _Mixing] = {}

    @torch.no_grad()
    def step(self, gradients: Tensor) -> None:
        """One step of every rank, with their gradients [n, N]."""
        row, x, step = self.row, self.flat["param"], self.clock.steps
        if gradients.shape != x.shape:
            raise ValueError(f"grad must return {list(x.shape)}, got {list(gradients.shape)}")
        gradients = gradients.to(x.dtype)
        exchanging = self.topology is not None and self.rhythm.exchanges(step)
        if row.exchanges == "gradients":
            gradients = _mean(gradients).expand_as(x)
        before, mixing = self._mixing(step, exchanging)
        if row.before is None:
            self._pass(row.after, gradients, mixing)
        else:
            self._pass(row.before, gradients, before)
            if row.follows(exchanging):
                self._pass(row.after, None, mixing)
        self.clock.tick(self.rhythm, exchanging, [self.group["lr"]])

    def _pass(self, stage: Stage, gradients: Tensor | None, mixing: Mix) -> None:
        row, group, x = self.row, self.group, self.flat["param"]
        first_half = stage is row.before
        hyper: tuple[Any, ...] = stage.hyper(group, self.clock.previous_lr.get(0, group["lr"] or 1.0))
        if first_half and row.normalized:
            hyper = (*hyper, self._inverse_norms(self.flat[row.normalized]))
        if stage.differences and isinstance(mixing, _Mixing):
            mixing = _Mixing(mixing.slots, 0.0)
        mixed = tuple(mixing(self.flat[name]) for name in (("param",) if first_half else row.messages))
        names, g = stage.states(group), torch.zeros_like(x) if gradients is None else gradients
        states = tuple(self.flat[name] for name in names)
        x, states, made = RULES[stage.rule](x, mixed, g, states, self.updates + 1.0, hyper)
        self.flat.update({"param": x}, **dict(zip(names, states, strict=True)))
        if first_half and "message" in row.messages:
            self.flat["message"] = made[0]
        if gradients is not None and row.counts_updates(group):
            self.updates += 1

    def _mixing(self, step: int, exchanging: bool) -> tuple[Mix, Mix]:
        """How the pass before the exchange and the one after it mix."""
        if self.row.name == "push_sum":
            return self._push(exchanging)
        if not exchanging:
            return _Mixing(), _Mixing()
        if self.rhythm.averages(step):
            return _Mixing(), _everyone
        number = self._round_number()
        if number not in self._mixings:
            self._mixings[number] = _Mixing(
                _slots([turn.recv for turn in self._turns(number)], self.flat["param"].dtype)
            )
        return _Mixing(), self._mixings[number]

    def _push(self, exchanging: bool) -> tuple[_Mixing, _Mixing]:
        """Push-sum's scale before and weights after, of all ranks; moves the scalars."""
        made = push(self._turns(self._round_number()), self.scalars) if exchanging else idle(self.scalars)
        self.scalars = made.after
        shares = [made.shares(rank) for rank in range(len(self.scalars))]
        return _Mixing(row_sum=self._column([one.scale for one in shares])), _Mixing(
            _slots([one.recv for one in shares], self.flat["param"].dtype),
            self._column([one.row_sum for one in shares]),
        )

    def _round_number(self) -> int:
        assert self.topology is not None
        period = self.topology.period
        return self.clock.exchanges if period is None else self.clock.exchanges % period

    def _turns(self, number: int) -> list[Round]:
        """Every rank's neighbours in a round; remembered, until an endless sequence moves on."""
        assert self.topology is not None
        if number not in self._rounds:
            if self.topology.period is None:
                self._rounds.clear()
                self._mixings.clear()
            self._rounds[number] = [self.topology.round(rank, number) for rank in range(len(self.scalars))]
        return self._rounds[number]

    def _column(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64).to(self.flat["param"].dtype)[:, None]

    def _inverse_norms(self, state: Tensor) -> Tensor:
        """1 / (||row|| + 1e-8) of each rank, 0 for a zero row: [n, 1].

        The order in which torch adds up a norm depends on where elements lie, so each row is laid out as
        `layout.plan` lays out the parameters of a real rank.
        """
        pieces = [nn.functional.pad(piece, (0, -piece.shape[1] % ALIGN)) for piece in state.split(self._sizes, dim=1)]
        norms = torch.stack([torch.linalg.vector_norm(row).double() for row in torch.cat(pieces, dim=1)])
        return torch.where(norms > 0, 1.0 / (norms + 1e-8), 0.0).to(state.dtype)[:, None]


# -- problems --------------------------------------------------------------------------------------------------------


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
        if not self.noise:
            return exact
        source = torch.Generator().manual_seed(self.seed * 2**32 + step)
        return exact + self.noise * torch.randn(X.shape, generator=source, dtype=X.dtype)

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
        chosen = self.indices(step)
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
