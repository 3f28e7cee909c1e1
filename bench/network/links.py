"""Networks as text: `"10mbit"`, `"10mbit/100mbit"` (up and down), `"10mbit,100mbit"` (the first host is slow)."""

import re
from dataclasses import dataclass
from typing import final

from gradwire.bench.errors import UsageError

_UNITS = {"kbit": 1_000, "mbit": 1_000_000, "gbit": 1_000_000_000}
_BURST_SECONDS = 1e-3
_LEAST_BURST = 3200
_QUEUE = "500ms"

FRAMES_COUNTED_UP_TO = 200_000_000
"""Bits per second up to which every frame passes the kernel by itself, so that a counted packet is a real frame."""


@final
@dataclass(frozen=True)
class Link:
    """What one host may send and receive.

    Args:
        up: Bits per second that it may send; None without limit.
        down: Bits per second that it may receive; None without limit.
    """

    up: int | None
    down: int | None


@final
@dataclass(frozen=True)
class Network:
    """The links of all hosts.

    Args:
        text: As the user wrote it.
        links: One for each host.

    Example:
        >>> network = parse("10mbit,100mbit", 3)
        >>> [link.up for link in network.links]
        [10000000, 100000000, 100000000]
        >>> network.slowest
        10000000
    """

    text: str
    links: tuple[Link, ...]

    @property
    def slowest(self) -> int | None:
        """Bits per second of the slowest direction of any link; None if none is limited."""
        return min((rate for link in self.links for rate in (link.up, link.down) if rate is not None), default=None)

    @property
    def counts_frames(self) -> bool:
        """Whether packets are sent one by one; above `FRAMES_COUNTED_UP_TO` the processor would be the link."""
        return self.slowest is not None and self.slowest <= FRAMES_COUNTED_UP_TO


def parse(text: str, hosts: int) -> Network:
    """Read a network: links joined by commas, the last of which is that of all further hosts.

    Args:
        text: Such as `100mbit`, `unlimited`, `10mbit/100mbit` or `10mbit,1gbit`.
        hosts: How many there are, >= 1.

    Raises:
        UsageError: it is not a network of so many hosts.
    """
    links = [_link(part, text) for part in text.split(",")]
    if len(links) > hosts:
        raise UsageError(f"--networks: expected at most {hosts} links, one for each host, got {text!r}.")
    return Network(text, tuple(links + links[-1:] * (hosts - len(links))))


def tbf(rate: int) -> list[str]:
    """Arguments of `tc qdisc replace` for a token bucket of this many bits per second.

    The bucket holds what passes in a millisecond, or two frames, so that short messages do not slip through unshaped;
    the queue is deep enough that nothing is dropped.
    """
    burst = max(_LEAST_BURST, int(rate / 8 * _BURST_SECONDS))
    return ["tbf", "rate", f"{rate}bit", "burst", str(burst), "latency", _QUEUE]


def in_words(rate: int | None) -> str:
    """`10 Mbit/s`."""
    if rate is None:
        return "unlimited"
    for unit, size in (("Gbit/s", 10**9), ("Mbit/s", 10**6)):
        if rate >= size:
            return f"{rate / size:g} {unit}"
    return f"{rate / 1000:g} kbit/s"


def title(text: str) -> str:
    """A network in words: `10 Mbit/s`, `10 up, 100 Mbit/s down`, `first host 10 Mbit/s, others 100 Mbit/s`."""

    def words(part: str) -> str:
        link = _link(part, text)
        if link.up == link.down:
            return in_words(link.up)
        return f"{in_words(link.up)} up, {in_words(link.down)} down"

    parts = text.split(",")
    if len(parts) == 1:
        return words(text)
    places = (*("first host", "second host", "third host")[: len(parts) - 1], "others")
    return "; ".join(f"{place} {words(part)}" for place, part in zip(places, parts, strict=True))


def _link(part: str, text: str) -> Link:
    up, slash, down = part.partition("/")
    return Link(_rate(up, text), _rate(down if slash else up, text))


def _rate(part: str, text: str) -> int | None:
    if part.strip().lower() == "unlimited":
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(kbit|mbit|gbit)", part.strip().lower())
    rate = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if rate < 8000:
        raise UsageError(
            f"--networks: expected rates such as 10mbit, 1gbit or unlimited, up/down as 10mbit/100mbit, one for each "
            f"host as 10mbit,100mbit, got {text!r}."
        )
    return rate
