"""`AsyncPolicy`: when a server that does not wait for its clients makes a step, and what messages count in it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, final

from gradwire.federated.client_times import ClientTimes, Job
from gradwire.federated.participation_weights import Weights, completion_shares

Staleness = Literal["constant", "polynomial", "hinge"] | Callable[[int], float]
"""What a message counts whose model is u server steps old: a named function of u with the papers' constants, or one of
the caller's, with values > 0."""


def polynomial(staleness: int, exponent: float = 0.5) -> float:
    """s(u) = (1 + u)^-exponent.

    Example:
        >>> [round(polynomial(u), 4) for u in (0, 1, 4, 10)]
        [1.0, 0.7071, 0.4472, 0.3015]
    """
    return float((1 + staleness) ** -exponent)


def hinge(staleness: int, slope: float = 10.0, start: int = 4) -> float:
    """s(u) = 1 up to `start`, 1 / (slope (u - start) + 1) from there on.

    Example:
        >>> [round(hinge(u), 6) for u in (0, 1, 4, 10)]
        [1.0, 1.0, 1.0, 0.016393]
    """
    return 1.0 if staleness <= start else 1.0 / (slope * (staleness - start) + 1.0)


@final
@dataclass(frozen=True)
class Workforce:
    """What is known of the clients of a simulation before it starts.

    Args:
        times: How long they take.
        jobs: One job like all others of every client; none if jobs differ in what times depend on.
        concurrency: How many are at work at any time.
        clients: How many there are.
    """

    times: ClientTimes
    jobs: Sequence[Job]
    concurrency: int
    clients: int

    def completion_shares(self) -> list[float] | None:
        """Each client's share of all finished jobs, if a free place is filled at once; None if it is not known."""
        means = [mean for job in self.jobs if (mean := self.times.mean(job)) is not None]
        return completion_shares(means, self.concurrency) if means and len(means) == self.clients else None


class AsyncPolicy(ABC):
    """When the server steps, from which model a message's pseudo-gradient counts, and how much it counts.

        x <- x - lr_server scale sum_i omega_i s(u_i) (x_sent - y_i)

    u_i is the number of steps that the server has made since it sent x_sent to the client, omega_i the weight that
    keeps the optimum, see `ParticipationWeights`. A subclass is a frozen dataclass without state.
    """

    interval: float | None = None
    """Seconds from one step to the next; None for steps that follow arrivals."""
    open_slots: int = 1
    """Free places at which new clients begin; fewer wait for more."""
    staleness: Staleness = "constant"
    max_staleness: int | None = None
    """Messages that are staler are dropped."""
    delta_from: Literal["sent", "current"] = "sent"
    weights: Weights = "auto"
    clip: float = 20.0

    def _check(self) -> None:
        name = type(self).__name__
        if self.open_slots < 1:
            raise ValueError(f"{name}: expected open_slots >= 1, got open_slots={self.open_slots}.")
        if not callable(self.staleness) and self.staleness not in ("constant", "polynomial", "hinge"):
            raise ValueError(
                f"{name}: expected staleness constant, polynomial, hinge or a function, got {self.staleness!r}."
            )
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ValueError(f"{name}: expected max_staleness >= 0, got max_staleness={self.max_staleness}.")
        if self.delta_from not in ("sent", "current"):
            raise ValueError(f"{name}: expected delta_from sent or current, got {self.delta_from!r}.")
        if self.weights not in ("auto", "estimated", "importance", "identical"):
            raise ValueError(
                f"{name}: expected weights auto, estimated, importance or identical, got {self.weights!r}."
            )
        if not self.clip >= 1:
            raise ValueError(f"{name}: expected clip >= 1, got clip={self.clip}.")

    def discounts(self, concurrency: int) -> bool:
        """Whether staleness changes what messages count: never if all clients at work make a step together."""
        rounds = self.interval is None and self.open_slots == self.arrivals_in_step(concurrency) == concurrency
        return not rounds and (self.staleness != "constant" or self.max_staleness is not None)

    def discount(self, staleness: int) -> float:
        """s(u)."""
        if callable(self.staleness):
            return self.staleness(staleness)
        if self.staleness == "constant":
            return 1.0
        return polynomial(staleness) if self.staleness == "polynomial" else hinge(staleness)

    def scale(self, step: int) -> float:
        """What the whole step of that number, from 0, is multiplied with."""
        return 1.0

    def arrivals_in_step(self, clients: int) -> int:
        """Messages in a step; with an interval, of one in which all clients count."""
        return 1

    @abstractmethod
    def participation(self, workforce: Workforce) -> list[float] | None:
        """Messages of each client per step on average, where there is a closed form."""


def per_arrival(arrivals: int, open_slots: int, workforce: Workforce) -> list[float] | None:
    """Messages of each client in a step of so many arrivals.

    Free places that are filled at once leave the flow of arrivals as it is, whatever the server does with it; if all
    clients at work are waited for, every step has a fresh cohort.
    """
    if open_slots == 1:
        shares = workforce.completion_shares()
        return None if shares is None else [arrivals * share for share in shares]
    if open_slots == arrivals == workforce.concurrency and workforce.times.always_available:
        return [arrivals / workforce.clients] * workforce.clients
    return None


def per_interval(interval: int, workforce: Workforce) -> list[float] | None:
    """Messages of each client in a step at the end of an interval in which any arrived, all clients being at work.

    A client that starts anew at every step that it takes part in takes part in one of `E ceil(T / interval)`. Intervals
    in which nothing arrives are no steps; clients are taken to be independent for their share.
    """
    counts = [c for job in workforce.jobs if (c := workforce.times.mean_intervals(job, interval)) is not None]
    if workforce.concurrency < workforce.clients or not counts or len(counts) < workforce.clients:
        return None
    any_arrives = 1.0 if min(counts) == 1 else -math.expm1(sum(math.log1p(-1 / count) for count in counts))
    return [1 / count / any_arrives for count in counts]
