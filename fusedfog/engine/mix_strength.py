"""`mix_strength=`: W_t = I + s (W - I), with s a number, or a function of the step, or of the step and the learning rate.

Passes add up weighted differences from neighbours, so s is a factor of all weights: a number that no kernel is compiled for.
It belongs to the step that mixes, with that step's learning rate, whenever the messages were sent.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from numbers import Real
from typing import Any, TypeAlias

Strength: TypeAlias = float | Callable[[int], float] | Callable[[int, float], float]
"""s; or step -> s; or (step, rate) -> s, rate being lr over the largest lr so far."""

_KINDS = "a number from 0 to 1, a function of the step, or a function of the step and the rate (lr over the largest lr so far)"
_TRIED = ((0, 1.0), (1, 1.0), (100, 1.0), (100, 0.5))
"""(step, rate) of which ranks compare a function's values."""


@dataclass(frozen=True)
class MixStrength:
    """How strongly a step mixes.

    Attributes:
        constant: s; None if a function says it.
        function: its value is s; called with the step and, if `takes_rate`, the rate.
    """

    constant: float | None = 1.0
    function: Callable[..., float] | None = None
    takes_rate: bool = False

    @staticmethod
    def of(given: object) -> MixStrength:
        """What a user gave.

        Raises:
            ValueError: a number that is not from 0 to 1.
            TypeError: neither a number nor a function of one or two positional arguments.
        """
        if callable(given):
            return MixStrength(None, given, _positional(given) == 2)
        if isinstance(given, bool) or not isinstance(given, Real):
            raise TypeError(f"mix_strength is {_KINDS}, got {given!r}")
        if not 0 <= float(given) <= 1:
            raise ValueError(
                f"mix_strength must be from 0 (ranks do not mix) to 1 (the topology's own W), got {given!r}: with more, "
                f"I + s (W - I) may have eigenvalues below -1, and ranks drift apart without bound"
            )
        return MixStrength(float(given))

    def at(self, rank: int, step: int, rate: float) -> float:
        """s of a step.

        Raises:
            ValueError: the function's value is not a number from 0 to 1; names rank, step and value.
        """
        if self.function is None:
            assert self.constant is not None
            return self.constant
        value = self._value(step, rate)
        try:
            strength = float(value)
        except (TypeError, ValueError, RuntimeError):
            strength = -1.0
        if not 0 <= strength <= 1:
            at = f"step {step} and rate {rate:.6g}" if self.takes_rate else f"step {step}"
            raise ValueError(f"rank {rank}: mix_strength must be a number from 0 to 1, but is {value!r} at {at}")
        return strength

    def described(self) -> str:
        """As ranks compare it: functions by some of their values, since a function's name says little."""
        if self.function is None:
            return repr(self.constant)
        tried = _TRIED if self.takes_rate else _TRIED[:3]
        named = "step and rate" if self.takes_rate else "step"
        points = (f"({step}, {rate:g})" if self.takes_rate else str(step) for step, rate in tried)
        values = ", ".join(f"{self._shown(*point)} at {name}" for point, name in zip(tried, points, strict=True))
        return f"a function of {named} ({values})"

    def _value(self, step: int, rate: float) -> Any:
        assert self.function is not None
        return self.function(step, rate) if self.takes_rate else self.function(step)

    def _shown(self, step: int, rate: float) -> str:
        try:
            return f"{float(self._value(step, rate)):.6g}"
        except Exception as error:  # Of a step that never comes, a table for instance need not know anything.
            return type(error).__name__


FULL = MixStrength()
"""The topology's own W."""


def _positional(function: Callable[..., Any]) -> int:
    """How many positional arguments without a default a function takes: 1 or 2."""
    try:
        every = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"mix_strength is {_KINDS}, got {function!r}, which does not tell its arguments; wrap it: lambda step: ..."
        ) from error
    needed = [one for one in every if one.default is Parameter.empty]
    count = sum(one.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for one in needed)
    if count not in (1, 2) or any(one.kind is Parameter.KEYWORD_ONLY for one in needed):
        raise TypeError(
            f"mix_strength is {_KINDS}; {function!r} needs other arguments: {inspect.signature(function)}. Those with a "
            f"default are left at it"
        )
    return count


def first_mixed(groups: Sequence[Mapping[str, Any]]) -> int:
    """The place of the first param group that is mixed, whose learning rate counts; 0 where there is none."""
    for place, group in enumerate(groups):  # A generator takes three times as long, in every step.
        if group.get("mix", True):
            return place
    return 0


def rate_of(lr: float, largest: float) -> float:
    """lr over the largest lr so far, this one included; 1 while all are zero."""
    largest = max(largest, lr)
    return lr / largest if largest else 1.0
