"""`communicate_every=`: which steps exchange with neighbours, every H-th, or those that a function says.

A function is asked of the step alone, so that the rhythm is one of the clock: a resumed run goes on in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

Rhythm: TypeAlias = int | Callable[[int], bool]
"""H: steps with (t + 1) % H == 0; or step t, from 0 -> whether it exchanges."""

_TRIED = 64
"""First steps of which ranks compare a function's values."""


def check_rhythm(rhythm: object) -> None:
    """Raise ValueError unless it is a whole number of at least 1, or a function."""
    if not callable(rhythm) and not (isinstance(rhythm, int) and not isinstance(rhythm, bool) and rhythm >= 1):
        raise ValueError(
            f"communicate_every must be a whole number of at least 1, or a function that says of a step whether it exchanges, "
            f"got {rhythm!r}"
        )


def is_due(rhythm: Rhythm, step: int) -> bool:
    """Whether step `step` exchanges with neighbours.

    Raises:
        TypeError: the function's value is neither True nor False, such as the H of somebody who expected to be asked for that.
    """
    if not callable(rhythm):
        return (step + 1) % rhythm == 0
    value: object = rhythm(step)
    if type(value).__name__ not in ("bool", "bool_"):  # numpy's own type is called one or the other.
        raise TypeError(
            f"communicate_every as a function says whether a step exchanges, True or False, but is {value!r} at step {step}; for "
            f"every H-th step that is lambda step: (step + 1) % H == 0"
        )
    return bool(value)


def pauses(rhythm: Rhythm) -> bool:
    """Whether there may be steps without an exchange."""
    return callable(rhythm) or rhythm > 1


def described(rhythm: Rhythm) -> str:
    """As ranks compare it: a function by its values, since its name says little."""
    if not callable(rhythm):
        return str(rhythm)
    try:
        steps = [str(step) for step in range(_TRIED) if is_due(rhythm, step)]
    except Exception as error:  # It is told by the step that needs the value.
        return f"a function of the step ({type(error).__name__} in the first {_TRIED})"
    return f"a function of the step (of the first {_TRIED} these exchange: {', '.join(steps) or 'none'})"
