"""Numbers that should be the same on all ranks, those of param groups and `mix_strength`: compared now and then, without a wait.

Construction compares all of them once. What a schedule makes of them afterwards is each rank's own affair, and a run whose
learning rates drift apart (ReduceLROnPlateau on each rank's own loss) looks healthy. So every 100 exchanges a rank writes
its numbers into the store and reads what the others wrote then, or the last time: two small keys a rank, overwritten in turn.

What should not be the same is compared with them, once: gradients. Ranks that shuffle with one seed see the same batches, and do
the work of one, several times.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fusedfog.comm.communicator import Communicator
from fusedfog.comm.store import own_store
from fusedfog.comm.whereabouts import name_ranks
from fusedfog.errors import MismatchWarning
from fusedfog.log import warn_user

EVERY = 100
"""Exchanges from one comparison to the next; steps, where there are no exchanges."""

_CLOSE = 1e-6
"""Relative difference that schedules in floating point may have on different machines."""

_MANY = 32
"""Ranks up to which every rank reads all others'; of more, all but rank 0 read rank 0's and their two neighbours'."""

_PRIVATE = ("params", "mix", "initial_lr")


class SameNumbers:
    """The comparisons of one optimizer."""

    def __init__(self, communicator: Communicator, channel: int) -> None:
        self._communicator = communicator
        self._prefix = f"{communicator.name}/numbers/{channel}"
        self._compared = 0
        self._own: dict[int, dict[str, float]] = {}
        self._gradient: float | None = None
        self._warned: set[str] = set()
        me, size = communicator.view.rank, communicator.view.size
        near = range(size) if size <= _MANY or me == 0 else sorted({0, (me - 1) % size, (me + 1) % size})
        self._others = [rank for rank in near if rank != me]
        for slot in (0, 1):  # Whoever reads a key finds it there.
            own_store().set(self._key(me, slot), "")

    def _key(self, rank: int, slot: int) -> str:
        return f"{self._prefix}/{rank}/{slot}"

    def look(
        self, groups: Sequence[Mapping[str, Any]], count: int, strength: float | None = None, *, own: bool = False
    ) -> None:
        """After exchange number `count`: if it is time, compare the groups' numbers with other ranks'.

        Args:
            strength: what a function has said of this exchange; see `mix_strength`.
            own: gradients are each rank's own, and of plain tensors.

        Warns:
            MismatchWarning: once for each entry of a group that differs.
            UserWarning: on rank 0, if all ranks had the same gradients in the first comparison.
        """
        if count % EVERY or count <= self._compared:
            return
        self._compared = count
        turn = count // EVERY
        numbers = numbers_of(groups) | ({} if strength is None else {"mix_strength": strength})
        self._own = {turn: numbers, **{t: before for t, before in self._own.items() if t == turn - 1}}
        if turn == 1 and own:
            self._gradient = norm_of_gradients(groups)
        # The store may have gone with the rank that hosted it, which is not for us to complain about.
        with contextlib.suppress(RuntimeError):
            store: Any = own_store()
            store.set(
                self._key(self._communicator.view.rank, turn % 2), json.dumps([turn, self._own[turn], self._gradient])
            )
            keys = [self._key(rank, slot) for rank in self._others for slot in (0, 1)]
            texts = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]
            said = [json.loads(text or "[0, {}, null]") for text in texts]
            self._compare([rank for rank in self._others for _ in (0, 1)], said)
            self._compare_gradients([gradient for theirs, _, gradient in said if theirs == 1])

    def _compare_gradients(self, theirs: Sequence[float | None]) -> None:
        me = self._communicator.view
        if self._gradient is None or me.rank or len(theirs) < me.size - 1 or set(theirs) != {self._gradient}:
            return
        self._gradient = None
        warn_user(
            f"rank 0: all {me.size} ranks had the same gradients in exchange {EVERY}, to the last bit: they see the same "
            f"batches, so that together they do the work of one. Give each a part of its own, DistributedSampler(data, "
            f"fusedfog.world_size(), fusedfog.rank()), or another seed",
            UserWarning,
        )

    def _compare(self, ranks: Sequence[int], said: Sequence[tuple[int, dict[str, float], float | None]]) -> None:
        for turn, own in self._own.items():
            theirs = {rank: numbers for rank, (theirs, numbers, _) in zip(ranks, said, strict=True) if theirs == turn}
            for name, value in own.items():
                by_rank = {rank: numbers[name] for rank, numbers in theirs.items() if name in numbers}
                if name not in self._warned and not all(_close(value, other) for other in by_rank.values()):
                    self._warn(name, {**by_rank, self._communicator.view.rank: value}, turn * EVERY)

    def _warn(self, name: str, by_rank: Mapping[int, float], count: int) -> None:
        self._warned.add(name)
        ranks: dict[float, list[int]] = {}
        for rank, value in sorted(by_rank.items()):
            same = next((known for known in ranks if _close(known, value)), value)
            ranks.setdefault(same, []).append(rank)
        values = ", ".join(f"{value:g} on {name_ranks(members)}" for value, members in ranks.items())
        warn_user(
            f"rank {self._communicator.view.rank}: {name} is {values} after {count} exchanges, and should be the same on all "
            f"ranks. If it follows a rank's own loss (ReduceLROnPlateau), give it fusedfog.mean(loss)",
            MismatchWarning,
        )


def numbers_of(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of groups that are mixed: "lr of group 0" and so on; without tensors on GPUs, which hosts would wait for."""
    found: dict[str, float] = {}
    # Groups that are not mixed are each rank's own in number, too.
    for g, group in enumerate(group for group in groups if group.get("mix", True)):
        for name, value in group.items():
            if name not in _PRIVATE:
                found |= {f"{part} of group {g}": number for part, number in _numbers(name, value)}
    return found


def norm_of_gradients(groups: Sequence[Mapping[str, Any]]) -> float | None:
    """A number that the gradients of other batches do not have; None without gradients, or where none may be read."""
    grads = [p.grad for group in groups if group.get("mix", True) for p in group["params"] if p.grad is not None]
    grads = [grad for grad in grads if grad.layout == torch.strided]
    if not grads or (grads[0].is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    norms = [norm.double() for norm in torch._foreach_norm(grads)]
    norm = float(torch.stack([one.to(norms[0].device) for one in norms]).sum())
    return norm if 0 < norm < math.inf else None


def _numbers(name: str, value: Any) -> list[tuple[str, float]]:
    if isinstance(value, (int, float)):
        return [(name, float(value))]
    if isinstance(value, Tensor) and value.numel() == 1 and value.device.type == "cpu":
        return [(name, float(value))]
    if isinstance(value, tuple) and all(isinstance(part, (int, float)) for part in value):
        return [(f"{name}[{i}]", float(part)) for i, part in enumerate(value)]
    return []


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_CLOSE) or (math.isnan(one) and math.isnan(other))
