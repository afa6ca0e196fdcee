"""Launches of a kernel whose compiled variant the host has launched before.

At every launch Triton works out anew, from all arguments and options, which variant of a kernel to take: 10 us of the 13
that a launch costs the host (Triton 3.7, the 26 arguments of a pass). `Launcher` asks it once for each kind of launch. What
makes a variant, in Triton 3.5 to 3.9 and on NVIDIA GPUs, are constants and options; of a tensor its dtype, and whether its
address is a multiple of 16; of a float, and of None, that it is one. Integers count by their values, so there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

_DIVISIBLE_BY = 16
_HERE: AbstractContextManager[object] = nullcontext()


@dataclass(frozen=True, eq=False)
class Constants:
    """What makes another kernel, and how it is compiled; made once each, since launches tell them apart by identity.

    Attributes:
        compiled: the kernel's constexpr parameters, its last ones, in its order.
        options: Triton's, as `num_warps`.
    """

    compiled: Mapping[str, Any]
    options: Mapping[str, Any]


class Launcher:
    """Launches one kernel.

    Args:
        kernel: what `triton.jit` has made; in Triton's interpreter, which has no variants, every launch is left to it.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._known: dict[Any, CompiledKernel] = {}

    def launch(self, programs: int, arguments: Sequence[Any], constants: Constants) -> CompiledKernel | None:
        """One launch of `programs` programs, on the current stream of the first argument's device.

        Args:
            arguments: all that are not constants, in the kernel's order: tensors, floats, None, and tuples of these.

        Returns:
            The variant, where a further launch of the same kinds of arguments may take it unasked.

        Raises:
            TypeError: an argument is something else, of which variants might depend in another way.
        """
        first: Tensor = arguments[0]
        key = constants, first.get_device(), kinds_of(arguments)
        with on_device_of(first):
            compiled = self._known.get(key)
            if compiled is not None:
                compiled[programs, 1, 1](*arguments, *constants.compiled.values())
                return compiled
            compiled = self.kernel[(programs,)](*arguments, **constants.compiled, **constants.options)
        # AMD's variants also depend on the sizes of tensors.
        if compiled is None or compiled.metadata.target.backend != "cuda":
            return None
        self._known[key] = compiled
        return compiled

    def bound(self, programs: int, arguments: Sequence[Any], constants: Constants) -> Callable[[], None]:
        """The same launch, to be made again and again, of arguments that stay what they are."""
        values = (*arguments, *constants.compiled.values())
        compiled: CompiledKernel | None = None

        def launch() -> None:
            nonlocal compiled
            if compiled is None:
                compiled = self.launch(programs, arguments, constants)
                return
            with on_device_of(arguments[0]):
                compiled[programs, 1, 1](*values)

        return launch

    def warm(self, arguments: Sequence[Any], constants: Constants) -> None:
        """Compile what `launch` would launch, and launch nothing. Of tensors, dtypes alone count."""
        with on_device_of(arguments[0]):
            self.kernel.warmup(*arguments, grid=(1,), **constants.compiled, **constants.options)

    def forget(self) -> None:
        """Ask Triton again, as is needed where its driver has changed."""
        self._known.clear()


def kinds_of(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """What Triton compiles in of arguments, see above; of tuples, the same of all they hold.

    Raises:
        TypeError: see `Launcher.launch`.
    """
    kinds: list[Any] = []
    for one in arguments:
        kind = type(one)
        if one is None or kind is float:
            kinds.append(kind)
        elif kind is tuple:
            kinds.append(kinds_of(one) if one else one)
        elif isinstance(one, Tensor):
            kinds.append((one.dtype,) if one.data_ptr() % _DIVISIBLE_BY else one.dtype)
        else:
            raise TypeError(f"a kernel's argument is a tensor, a float, None or a tuple of those, not {one!r}")
    return tuple(kinds)


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's device the current one, where launches go; the interpreter's tensors are on the CPU."""
    elsewhere = tensor.is_cuda and tensor.get_device() != torch.cuda.current_device()
    return torch.cuda.device(tensor.device) if elsewhere else _HERE
