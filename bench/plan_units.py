"""Quantities as people write them: 100Mbit, 25 Gb/s, 0.5ms, 125M."""

import re
from collections.abc import Mapping

from gradwire.bench.errors import UsageError

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9, "min": 60.0}
_COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}


def bandwidth(text: str, option: str = "--bandwidth") -> float:
    """Bytes per second; `bit`, `b` and `bps` are bits, `B` is bytes.

    Raises:
        UsageError: It is not a bandwidth.

    Example:
        >>> bandwidth("100Mbit"), bandwidth("25 Gb/s"), bandwidth("1.5GB/s")
        (12500000.0, 3125000000.0, 1500000000.0)
    """
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kKmMgGtT]?i?)(bits?|bps|b|Bps|B|bytes?)(?:/s|ps)?", text.strip())
    if match and (number := _number(match[1])):
        return (
            number * _PREFIXES[match[2].lower()] / (1 if match[3].lower().startswith("byte") or "B" in match[3] else 8)
        )
    raise UsageError(f"{option}: expected a bandwidth such as 100Mbit, 25Gb/s or 1.5GB/s, got {text!r}.")


def seconds(text: str, option: str = "--latency") -> float:
    """Seconds, of a number and its unit.

    Raises:
        UsageError: It is not a time.

    Example:
        >>> seconds("0.5ms"), seconds("40 ms"), seconds("2s")
        (0.0005, 0.04, 2.0)
    """
    return _quantity(text, option, _SECONDS, "a time with its unit such as 0.5ms, 40ms or 1.2s")


def count(text: str, option: str) -> int:
    """A whole number, perhaps in thousands (k), millions (M) or billions (B).

    Raises:
        UsageError: It is not a number above 0.

    Example:
        >>> count("125M", "--parameters"), count("7e9", "--parameters")
        (125000000, 7000000000)
    """
    found = round(_quantity(text, option, _COUNTS, "a number above 0 such as 125M or 8192"))
    if found < 1:
        raise UsageError(f"{option}: expected a number above 0 such as 125M or 8192, got {text!r}.")
    return found


def show_rate(bytes_per_second: float) -> str:
    """Bits per second in a unit that can be read."""
    value = 8 * bytes_per_second
    for unit in ("bit/s", "kbit/s", "Mbit/s"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} Gbit/s" if value < 1000 else f"{value / 1000:,.3g} Tbit/s"


def show_seconds(value: float) -> str:
    """Seconds in a unit that can be read."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def _quantity(text: str, option: str, units: Mapping[str, float], expected: str) -> float:
    match = re.fullmatch(r"([\d.,_]+(?:e[+-]?\d+)?)\s*([^\W\d]*)", text.strip(), re.IGNORECASE)
    number = _number(match[1]) if match else None
    if match is None or number is None or match[2].lower() not in units:
        raise UsageError(f"{option}: expected {expected}, got {text!r}.")
    return number * units[match[2].lower()]


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", "").replace("_", ""))
    except ValueError:
        return None
