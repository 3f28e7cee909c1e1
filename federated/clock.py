"""`EventClock`: virtual time in whole ticks, and what is still to come."""

import heapq
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, final

TICKS_PER_SECOND = 10**9
"""Virtual time is counted in nanoseconds, as Python's integers: comparisons are exact, and nothing overflows."""


def to_ticks(seconds: float) -> int:
    """The nearest number of ticks, at least one for a time that is not zero.

    Example:
        >>> 3 * to_ticks(0.1) == to_ticks(0.3), 3 * 0.1 == 0.3
        (True, False)
    """
    if not (seconds >= 0 and math.isfinite(seconds)):
        raise ValueError(f"to_ticks: expected a finite time >= 0, got {seconds} seconds.")
    return max(round(seconds * TICKS_PER_SECOND), int(seconds > 0))


def to_seconds(ticks: int) -> float:
    """The time of so many ticks."""
    return ticks / TICKS_PER_SECOND


@final
class Flight(NamedTuple):
    """A client at work: it received a version of the model, and its message arrives at a tick.

    Args:
        tick: When the server has the message.
        order: Of dispatch, over all clients; among messages of one tick, the one dispatched first arrives first.
        client: Its number.
        version: Of the model that it received: how many steps the server had made.
        wave: How many times the server had handed out work before; no client gets work twice in a wave.
    """

    tick: int
    order: int
    client: int
    version: int
    wave: int


@final
class EventClock:
    """Virtual time, and the messages that are on their way, in the order in which they arrive.

    Nothing waits in real time: the clock jumps from one arrival to the next.

    Cost:
        O(log n) for each message, n on their way.

    State:
        now: The tick. The messages on their way, and how many were ever sent off.

    Example:
        >>> clock = EventClock()
        >>> clock.send_off(client=0, duration=7, version=0, wave=0)
        >>> clock.send_off(client=1, duration=5, version=0, wave=0)
        >>> clock.next_arrival().client, clock.now
        (1, 5)
    """

    def __init__(self) -> None:
        self.now = 0
        self._order = 0
        self._flights: list[Flight] = []

    def __len__(self) -> int:
        """Messages on their way."""
        return len(self._flights)

    @property
    def flights(self) -> list[Flight]:
        """Messages on their way, in the order in which they will arrive."""
        return sorted(self._flights)

    @property
    def next_tick(self) -> int:
        """When the next message arrives; there must be one."""
        return self._flights[0].tick

    def send_off(self, client: int, duration: int, version: int, wave: int) -> None:
        """Let a client begin now with work that takes so many ticks, >= 1."""
        assert duration >= 1
        heapq.heappush(self._flights, Flight(self.now + duration, self._order, client, version, wave))
        self._order += 1

    def next_arrival(self) -> Flight:
        """Go to the next message, and take it."""
        flight = heapq.heappop(self._flights)
        self.now = flight.tick
        return flight

    def arrivals_until(self, tick: int) -> list[Flight]:
        """Go to a tick, and take all messages that have arrived by then, in order."""
        assert tick >= self.now
        arrived = []
        while self._flights and self._flights[0].tick <= tick:
            arrived.append(heapq.heappop(self._flights))
        self.now = tick
        return arrived

    def wait_until(self, tick: int) -> None:
        """Go to a tick before which nothing arrives."""
        assert tick >= self.now
        assert not self._flights or tick <= self.next_tick
        self.now = tick

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {"now": self.now, "order": self._order, "flights": [list(flight) for flight in self.flights]}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.now, self._order = saved["now"], saved["order"]
        self._flights = [Flight(*flight) for flight in saved["flights"]]
        heapq.heapify(self._flights)
