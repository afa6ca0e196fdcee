"""What `loss.py` trains: a byte GPT, a byte MLP, and digits split by label, as losses of n stacked models at once.

Models are written on stacked parameters [n, ...], so that one backward pass gives every rank its own gradient. Text is
Python's standard library as bytes, dealt to the ranks as the examples do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from digits_table import deal, images
from torch import Tensor
from torch.nn.functional import cross_entropy, gelu, layer_norm

from fusedfog.examples import text

WINDOWS = 8
"""Windows of text, or digits in fours, that one rank sees in a step."""


@dataclass(frozen=True)
class Shape:
    """A parameter: its shape, the standard deviation it starts with (None: ones), and whether weight decay is for it."""

    shape: tuple[int, ...]
    std: float | None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        return len(self.shape) >= 2 and self.shape[0] > 1


class Task(Protocol):
    """One model and its data."""

    @property
    def steps(self) -> int:
        """How many a run has."""

    @property
    def warm_up(self) -> int:
        """Steps until the whole rate."""

    @property
    def shapes(self) -> Sequence[Shape]:
        """Its parameters in order."""

    def losses(self, params: Sequence[Tensor], step: int) -> Tensor:
        """Mean loss of every rank on its batch of a step, [n], of parameters [n, ...]."""

    def validation(self, params: Sequence[Tensor]) -> float:
        """Loss of one model, parameters [1, ...], on data that nobody trains on."""


@cache
def _bytes(ranks: int) -> tuple[tuple[Tensor, ...], Tensor]:
    root = text.standard_library()
    train, validation = text.split(root)
    return text.read(root, train).tensor_split(ranks), text.read(root, validation)


class Bytes:
    """Batches of text: `per_rank` windows of `length` bytes for each of n ranks, as a function of (seed, step)."""

    def __init__(self, ranks: int, length: int, seed: int, per_rank: int) -> None:
        self.pieces, held_out = _bytes(ranks)
        self.length, self.seed, self.per_rank = length, seed, per_rank
        self.held_out = text.evenly_spaced(held_out, 512, length)

    def batch(self, step: int) -> Tensor:
        """[n, per_rank, length]."""
        source = torch.Generator().manual_seed(self.seed * 2**32 + step)
        draws = torch.rand(len(self.pieces), self.per_rank, generator=source, dtype=torch.float64)
        return torch.stack(
            [
                text.cut(piece, (draw * (len(piece) - self.length + 1)).long(), self.length)
                for piece, draw in zip(self.pieces, draws, strict=True)
            ]
        )


def _rows(table: Tensor, index: Tensor) -> Tensor:
    """[n, rows, width] looked up by [n, ...] -> [n, ..., width]."""
    places = index + torch.arange(len(table)).view(-1, *[1] * (index.dim() - 1)) * table.shape[1]
    rows: Tensor = table.flatten(0, 1)[places]
    return rows


def _apply(x: Tensor, weight: Tensor) -> Tensor:
    """[n, ..., a] by [n, a, b]."""
    product: Tensor = (x.flatten(1, -2) @ weight).unflatten(1, x.shape[1:-1])
    return product


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:]) * gain.view(len(gain), *[1] * (x.dim() - 2), -1)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of each rank: [n]."""
    every = cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return every.view(len(logits), -1).mean(1)


class Gpt:
    """One layer, width 32, four heads, context 64, embedding tied to the output."""

    name, steps, warm_up = "GPT", 1000, 50
    width, heads, context = 32, 4, 64
    shapes = (
        Shape((256, 32), 0.02),
        Shape((64, 32), 0.02),
        Shape((32,), None),
        Shape((32, 96), 0.02),
        Shape((32, 32), 0.02 / math.sqrt(2)),
        Shape((32,), None),
        Shape((32, 128), 0.02),
        Shape((128, 32), 0.02 / math.sqrt(2)),
        Shape((32,), None),
    )

    def __init__(self, ranks: int, seed: int, batch: int = 1) -> None:
        self.data = Bytes(ranks, self.context + 1, seed, WINDOWS * batch)

    def _logits(self, params: Sequence[Tensor], tokens: Tensor) -> Tensor:
        embedding, places, norm_1, qkv, out, norm_2, up, down, norm = params
        x = _rows(embedding, tokens) + places[:, None]
        q, k, v = _apply(_norm(x, norm_1), qkv).unflatten(-1, (3, self.heads, -1)).permute(3, 0, 1, 4, 2, 5)
        future = torch.ones(self.context, self.context, dtype=torch.bool).triu(1)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(self.width / self.heads)).masked_fill(future, -math.inf)
        x = x + _apply((scores.softmax(-1) @ v).transpose(2, 3).flatten(3), out)
        x = x + _apply(gelu(_apply(_norm(x, norm_2), up)), down)
        return _apply(_norm(x, norm), embedding.transpose(1, 2))

    def losses(self, params: Sequence[Tensor], step: int) -> Tensor:
        tokens = self.data.batch(step)
        return _cross_entropy(self._logits(params, tokens[..., :-1]), tokens[..., 1:])

    def validation(self, params: Sequence[Tensor]) -> float:
        tokens = self.data.held_out[None]
        return float(_cross_entropy(self._logits(params, tokens[..., :-1]), tokens[..., 1:]))


class Mlp:
    """Predicts a byte from the eight before it: embeddings of 16, width 32, one residual block, 32 positions a window."""

    name, steps, warm_up = "MLP", 500, 50
    before, positions = 8, 32
    shapes = (
        Shape((256, 16), 0.1),
        Shape((128, 32), 1 / math.sqrt(128)),
        Shape((32, 32), 1 / math.sqrt(32)),
        Shape((32, 32), 0.5 / math.sqrt(32)),
        Shape((32,), None),
        Shape((32, 256), 1 / math.sqrt(32)),
    )

    def __init__(self, ranks: int, seed: int, batch: int = 1) -> None:
        self.data = Bytes(ranks, self.before + self.positions, seed, WINDOWS * batch)

    def _losses(self, params: Sequence[Tensor], tokens: Tensor) -> Tensor:
        embedding, first, up, down, gain, out = params
        seen = tokens.unfold(-1, self.before, 1)[..., : self.positions, :]
        x = gelu(_apply(_rows(embedding, seen).flatten(-2), first))
        x = x + _apply(gelu(_apply(x, up)), down)
        return _cross_entropy(_apply(_norm(x, gain), out), tokens[..., self.before :])

    def losses(self, params: Sequence[Tensor], step: int) -> Tensor:
        return self._losses(params, self.data.batch(step))

    def validation(self, params: Sequence[Tensor]) -> float:
        return float(self._losses(params, self.data.held_out[None]))


class Digits:
    """scikit-learn's digits, labels dealt to the ranks by Dirichlet(0.1); 64-32-10, tanh."""

    name, steps, warm_up = "digits", 250, 20
    shapes = (Shape((64, 32), 1 / 8), Shape((1, 32), 0.01), Shape((32, 10), 1 / math.sqrt(32)), Shape((1, 10), 0.01))

    def __init__(self, ranks: int, seed: int, batch: int = 1) -> None:
        self.x, self.y, self.test_x, self.test_y = images(seed)
        self.hands, self.seed, self.per_rank = deal(self.y, ranks, 0.1, seed), seed, 16 * batch

    def _logits(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        one, bias_1, two, bias_2 = params
        return torch.tanh(x @ one + bias_1) @ two + bias_2

    def losses(self, params: Sequence[Tensor], step: int) -> Tensor:
        source = torch.Generator().manual_seed(self.seed * 2**32 + step)
        draws = torch.rand(len(self.hands), self.per_rank, generator=source, dtype=torch.float64)
        chosen = torch.stack([hand[(draw * len(hand)).long()] for hand, draw in zip(self.hands, draws, strict=True)])
        return _cross_entropy(self._logits(params, self.x[chosen]), self.y[chosen])

    def validation(self, params: Sequence[Tensor]) -> float:
        return float(_cross_entropy(self._logits(params, self.test_x[None]), self.test_y[None]))


TASKS: dict[str, type[Gpt] | type[Mlp] | type[Digits]] = {task.name: task for task in (Gpt, Mlp, Digits)}
