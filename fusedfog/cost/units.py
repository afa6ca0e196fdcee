"""Quantities as people write them: 25Gb/s, 3 GB/s, 30us, 25.6e6."""

from __future__ import annotations

import math
import re

_NUMBER = r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*"
_RATE = re.compile(_NUMBER + r"([kKMGT]i?)?(bit|bits|byte|bytes|b|B)(?:/s|ps)\s*")
_TIME = re.compile(_NUMBER + r"(s|ms|us|µs|μs|ns)\s*")
_COUNT = re.compile(_NUMBER + r"([kKMBGT])?\s*")

_SCALE = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_SCALE |= {"Ki": 2.0**10, "ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ns": 1e-9}


def parse_rate(text: str) -> float:
    """Bytes per second of, for instance, "25Gb/s" (bits), "3 GB/s" (bytes), "100 Mbit/s" or "200Gbps".

    Raises:
        ValueError: it is not a positive rate with a unit.
    """
    match = _RATE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a rate; write bits as 25Gb/s or bytes as 3GB/s, with the unit")
    number, prefix, unit = match.groups()
    bits = unit in ("b", "bit", "bits")
    return _positive(number, text, "a rate") * _SCALE[prefix or ""] / (8 if bits else 1)


def parse_time(text: str) -> float:
    """Seconds of, for instance, "30us", "0.2 ms" or "1e-5s"; zero is allowed.

    Raises:
        ValueError: it is not a time with a unit.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a time; write it with its unit, as 30us or 0.2ms")
    number, unit = match.groups()
    return _number(number, text, "a time") * _SECONDS[unit]


def parse_count(text: str) -> int:
    """A whole positive number, for instance "25.6e6", "25.6M" or "7B".

    Raises:
        ValueError: it is not one.
    """
    match = _COUNT.fullmatch(text)
    scale = {"B": 1e9} | _SCALE
    value = _number(match[1], text, "a count") * scale[match[2] or ""] if match else 0.0
    count = round(value)
    if not 1 <= value < 1e18 or abs(value - count) > 1e-6 * value:
        raise ValueError(f"{text!r} is not a whole positive number; write it as 25600000, 25.6e6 or 25.6M")
    return count


def _number(number: str, text: str, what: str) -> float:
    try:
        value = float(number)
    except ValueError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not {what}")
    return value


def _positive(number: str, text: str, what: str) -> float:
    value = _number(number, text, what)
    if value <= 0:
        raise ValueError(f"{text!r} is not {what}: it must be positive")
    return value


def show_rate(bandwidth: float) -> str:
    """Bytes per second as bits and bytes, for instance "25 Gb/s (3.12 GB/s)"."""
    if math.isinf(bandwidth):
        return "unlimited"
    return f"{_scaled(8 * bandwidth)}b/s ({_scaled(bandwidth)}B/s)"


def show_time(seconds: float) -> str:
    """A time with a fitting unit, for instance "30 us"."""
    for factor, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def show_bytes(count: float) -> str:
    """Bytes with a fitting unit, for instance "102 MB"."""
    return f"{_scaled(count)}B"


def _scaled(value: float) -> str:
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "
