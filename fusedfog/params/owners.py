"""Who trains a parameter: one optimizer at a time, since a parameter can lie in one flat buffer only.

Two that both believe to own a parameter would each update memory that the other does not see. So every optimizer claims its
parameters when it is built, and a second one is refused with the first one's name. Claims end when their holder is released,
has left, or is gone.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Protocol

import torch
from torch import Tensor

from fusedfog.params.flat import FlatSegment

# By id, which is a parameter's as long as its optimizer, and so the claim, lives: to parameters that somebody refers to weakly
# torch.utils.swap_tensors, and with it model.to(...), says no.
_owners: dict[int, weakref.ref[Claim]] = {}
_OURS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


class Holder(Protocol):
    """What a claim needs of the optimizer that makes it."""

    @property
    def ended(self) -> bool:
        """Whether it can make no more steps."""
        ...

    def release(self) -> None:
        """Let go of all parameters."""
        ...


class Claim:
    """One optimizer's claim on its parameters.

    Args:
        name: what errors call the optimizer.

    Attributes:
        where: the line of the user's code that built it.
        segments: where the parameters lie, once they do.
    """

    def __init__(self, name: str, holder: Holder) -> None:
        frame = _users_frame()
        self.name, self.where = name, f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "?"
        self.segments: list[FlatSegment] = []
        self._holder = weakref.ref(holder)

    def check(self, params: Mapping[str, Tensor]) -> None:
        """Raise ValueError if another optimizer trains one of these parameters, by name."""
        others = self._others(params.values())
        if others:
            # Perhaps nobody knows it any more, and only a circle of references keeps it.
            del others
            gc.collect()
        for name, param in params.items():
            for other, holder in self._others([param]):
                if not holder.ended:
                    raise ValueError(
                        f"parameter {name} is trained by another optimizer already, {other.name} (built at {other.where}). "
                        f"Call its release() first, or drop it and what refers to it, as schedulers do. To change "
                        f"hyper-parameters write to opt.param_groups, for further parameters use opt.add_param_group"
                    )

    def take(self, params: Sequence[Tensor]) -> None:
        """Be the owner of these parameters; those that were are released."""
        for _, holder in self._others(params):
            holder.release()
        own = [id(param) for param in params]
        reference = weakref.ref(self, lambda gone: _forget(own, gone))
        _owners.update(dict.fromkeys(own, reference))

    def drop(self, first: int = 0) -> None:
        """Own the parameters of the segments from number `first` on no more, and give them ordinary storages."""
        for segment in self.segments[first:]:
            segment.give_back()
            for param in segment.owners:
                found = _owners.get(id(param))
                if found is not None and found() is self:
                    del _owners[id(param)]
        del self.segments[first:]

    def _others(self, params: Iterable[Tensor]) -> list[tuple[Claim, Holder]]:
        found: list[tuple[Claim, Holder]] = []
        for param in params:
            reference = _owners.get(id(param))
            claim = reference() if reference is not None else None
            holder = claim._holder() if claim is not None and claim is not self else None
            if claim is not None and holder is not None and all(claim is not other for other, _ in found):
                found.append((claim, holder))
        return found


def _forget(keys: Iterable[int], reference: weakref.ref[Claim]) -> None:
    for key in keys:
        if _owners.get(key) is reference:
            del _owners[key]


def _users_frame() -> FrameType | None:
    """The innermost frame that is neither ours nor torch's."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame = frame.f_back
    return frame
