"""What the scripts here share: a record of what a framework did on this rank, and the same training written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import default_collate

import fusedfog

STEPS, ACCUMULATE, LR, CLIP = 8, 2, 1e-2, 0.5
LENGTH, VOCABULARY = 12, 32

Loss: TypeAlias = Callable[..., Tensor]


def tokens(number: int) -> list[dict[str, Tensor]]:
    """Sequences that count upwards from different numbers, at different paces: something to learn."""
    generator = torch.Generator().manual_seed(7)
    starts = torch.randint(VOCABULARY, (number, 1), generator=generator)
    paces = torch.randint(1, 4, (number, 1), generator=generator)
    sequences = (starts + paces * torch.arange(LENGTH)) % VOCABULARY
    return [{"input_ids": sequence, "labels": sequence} for sequence in sequences]


class Network(nn.Module):
    """Predicts a sequence's last number from the others; returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Embedding(VOCABULARY, 4),
            nn.Flatten(),
            nn.Linear(4 * (LENGTH - 1), 16),
            nn.Tanh(),
            nn.Linear(16, VOCABULARY),
        )

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.layers(input_ids[:, :-1]), labels[:, -1])


def call(model: nn.Module, **batch: Any) -> Tensor:
    return model(**batch)


class Record:
    """Where the first forward found this rank, what the model was fed and which gradients the optimizer saw."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.start: dict[str, Any] = {}
        self.inputs: list[dict[str, Any]] = []
        self.gradients: list[list[Tensor]] = []
        self.rates: list[float] = []
        model.register_forward_pre_hook(self._fed, with_kwargs=True)
        optimizer.register_step_post_hook(self._stepped)

    def _fed(self, model: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not model.training:
            return
        if not self.inputs:
            self.start = {"model": clones(model.parameters()), "optimizer": self.optimizer.state_dict()}
            self.start["optimizer"]["state"] = {
                key: {name: value.clone() for name, value in state.items()}
                for key, state in self.start["optimizer"]["state"].items()
            }
        self.inputs.append({name: kwargs[name] for name in ("input_ids", "labels")})

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: dict[str, Any]) -> None:
        self.gradients.append(clones(p.grad for p in self.model.parameters()))
        self.rates.append(optimizer.param_groups[0]["lr"])

    def save(self, data: Any, evaluated: float, accumulate: int = ACCUMULATE, loss_of: Loss = call) -> None:
        """Write record-RANK.pt: what happened, with the averaged model's loss on `data`, and what should have."""
        values = clones(self.model.parameters())
        put(self.model.eval(), mean_of_ranks(values))
        with torch.no_grad():
            mean_loss = loss_of(self.model, **default_collate(data)).item()
        fed = list(self.inputs)  # the training below is recorded too
        record = {
            "start": self.start["model"],
            "fed": [kwargs["input_ids"] for kwargs in fed],
            "gradients": self.gradients,
            "parameters": values,
            "evaluated": evaluated,
            "evaluated_by_hand": mean_loss,
            "parameters_by_hand": self._by_hand(loss_of, accumulate, list(fed)),
            "parameters_of_plain_loop": self._plain_loop(loss_of, accumulate, list(fed)),
        }
        torch.save(record, f"record-{dist.get_rank()}.pt")

    @torch.enable_grad()
    def _by_hand(self, loss_of: Loss, accumulate: int, fed: list[dict[str, Any]]) -> list[Tensor]:
        """X+ = W X + (AdamW(X) - X) from the same start on the same data; between two ranks W is 1/2 everywhere."""
        model = self.model.train()
        put(model, self.start["model"])
        params = list(model.parameters())
        inner = torch.optim.AdamW([{"params": group["params"]} for group in self.optimizer.param_groups], lr=LR)
        inner.load_state_dict(self.start["optimizer"])
        for step in range(STEPS - len(fed) // accumulate, STEPS):
            inner.zero_grad()
            for _ in range(accumulate):
                (loss_of(model, **fed.pop(0)) / accumulate).backward()
            nn.utils.clip_grad_norm_(params, CLIP)
            for group in inner.param_groups:
                group["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / STEPS))
            before = clones(params)
            inner.step()
            with torch.no_grad():
                for param, old, mean in zip(params, before, mean_of_ranks(before), strict=True):
                    param += mean - old
        return clones(params)

    @torch.enable_grad()
    def _plain_loop(self, loss_of: Loss, accumulate: int, fed: list[dict[str, Any]]) -> list[Tensor]:
        """fusedfog.AdamW in the loop of a script of one's own, with the learning rates that the framework's schedule gave."""
        model = self.model.train()
        groups = [{"params": group["params"]} for group in self.optimizer.param_groups]
        self.optimizer.release()
        put(model, self.start["model"])
        optimizer = fusedfog.AdamW(groups, lr=LR, topology="one_peer_exponential", sync_init=False)
        optimizer.load_state_dict(self.start["optimizer"])
        for rate in self.rates:
            optimizer.zero_grad()
            for _ in range(accumulate):
                (loss_of(model, **fed.pop(0)) / accumulate).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        optimizer.drain()
        return clones(model.parameters())


def clones(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


@torch.no_grad()
def put(model: nn.Module, values: list[Tensor]) -> None:
    for param, value in zip(model.parameters(), values, strict=True):
        param.copy_(value)


def mean_of_ranks(values: list[Tensor]) -> list[Tensor]:
    means = clones(values)
    for mean in means:
        dist.all_reduce(mean)
    return [mean / dist.get_world_size() for mean in means]
