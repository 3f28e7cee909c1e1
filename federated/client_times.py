"""`ClientTimes`: how long clients take, in virtual time; fixed, exponential and half-normal."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar, final

from gradwire.compression import counter_rng
from gradwire.federated.clock import to_seconds, to_ticks

_NORMAL = NormalDist()


@final
@dataclass(frozen=True)
class Job:
    """Work of a client, from the model on its way down to the message on its way up.

    Args:
        client: Its number.
        number: Of this client's jobs, or of the round; random times depend on seed, client and it alone.
        start: Tick at which the server has the model ready.
        examples: That it trains on, each as often as it comes.
        bytes_down: Of the model and what comes with it.
        bytes_up: Of its message.
    """

    client: int
    number: int = 0
    start: int = 0
    examples: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


class ClientTimes(ABC):
    """How long each client takes from receiving the model until the server has its message.

    Random times are functions of (seed, client, number of the job): they depend neither on the order in which clients
    are asked, nor on what other clients do.
    """

    depends_on_work: ClassVar[bool] = False
    """Whether times follow from the examples and bytes of a job."""
    always_available: ClassVar[bool] = True
    """Whether every client can begin at any time."""

    @abstractmethod
    def check(self, clients: int) -> None:
        """Raise ValueError if there are times for fewer clients."""

    @abstractmethod
    def duration(self, job: Job, seed: int) -> int:
        """Ticks that a job takes, >= 1."""

    def mean(self, job: Job) -> float | None:
        """Mean seconds of a job like this one, or None where it is not known."""
        return None

    def mean_intervals(self, job: Job, interval: int) -> float | None:
        """Mean number of intervals of so many ticks that jobs like this one take, begun intervals counted whole.

            E ceil(T / interval) = sum_{k >= 0} P(T > k interval)

        None where it is not known.
        """
        return None

    def share_done(self, job: Job, seed: int, deadline: int) -> float:
        """The share of the client's training that it can do if its message must be there after so many ticks."""
        return min(1.0, deadline / self.duration(job, seed))

    def available_from(self, client: int, tick: int) -> int:
        """The first tick from this one on at which the client can begin."""
        return tick


class _PerClient(ClientTimes):
    """Times whose law is known for each client by its mean."""

    seconds: float | Sequence[float]

    def __post_init__(self) -> None:
        name = type(self).__name__
        values = [self.seconds] if isinstance(self.seconds, (int, float)) else list(self.seconds)
        if not values:
            raise ValueError(f"{name}: expected at least one client's seconds, got none.")
        for value in values:
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name}: expected finite seconds > 0, got {value}.")

    def check(self, clients: int) -> None:
        """Raise ValueError if the seconds are those of fewer clients."""
        if not isinstance(self.seconds, (int, float)) and len(self.seconds) < clients:
            raise ValueError(
                f"{type(self).__name__}: expected seconds for {clients} clients, got {len(self.seconds)}. "
                "Give one number for all, or one each."
            )

    def _seconds(self, client: int) -> float:
        return self.seconds if isinstance(self.seconds, (int, float)) else self.seconds[client]

    def mean(self, job: Job) -> float | None:
        """That of the client."""
        return self._seconds(job.client)


def uniform(seed: int, job: Job) -> float:
    """A number in (0, 1) for this job."""
    return ((counter_rng.fold(seed, "time", job.client, job.number) >> 10) + 0.5) * 2.0**-52


@final
@dataclass(frozen=True)
class FixedTimes(_PerClient):
    """Every job of a client takes the same time.

    Args:
        seconds: > 0; one number, or one for each client.

    Example:
        >>> times = FixedTimes([1.0, 2.5])
        >>> times.duration(Job(client=1), seed=0), times.mean_intervals(Job(client=1), to_ticks(1.0))
        (2500000000, 3.0)
    """

    seconds: float | Sequence[float]

    def duration(self, job: Job, seed: int) -> int:
        """That of the client."""
        return to_ticks(self._seconds(job.client))

    def mean_intervals(self, job: Job, interval: int) -> float | None:
        """Rounded up, of integers."""
        return float(-(-self.duration(job, 0) // interval))


@final
@dataclass(frozen=True)
class ExponentialTimes(_PerClient):
    """Memoryless times: how long a client still needs does not depend on how long it has been at work.

        P(T > t) = exp(-t / seconds)

    Args:
        seconds: Mean, > 0; one number, or one for each client.

    Example:
        >>> times = ExponentialTimes(2.0)
        >>> times.mean(Job(client=3)), round(times.mean_intervals(Job(client=3), to_ticks(1.0)), 6)
        (2.0, 2.541494)
    """

    seconds: float | Sequence[float]

    def duration(self, job: Job, seed: int) -> int:
        """Drawn by inversion."""
        return to_ticks(-math.log(uniform(seed, job)) * self._seconds(job.client))

    def mean_intervals(self, job: Job, interval: int) -> float | None:
        """1 / (1 - exp(-interval / seconds))."""
        return -1.0 / math.expm1(-to_seconds(interval) / self._seconds(job.client))


@final
@dataclass(frozen=True)
class HalfNormalTimes(_PerClient):
    """The absolute value of a normal number: many quick jobs, and a tail of slow ones.

        T = |z|, z ~ N(0, sigma^2), sigma = seconds sqrt(pi / 2);    P(T > t) = erfc(t / (sigma sqrt(2)))

    Args:
        seconds: Mean, > 0; one number, or one for each client.

    Example:
        >>> times = HalfNormalTimes(2.0)
        >>> times.mean(Job(client=3)), round(times.mean_intervals(Job(client=3), to_ticks(1.0)), 6)
        (2.0, 2.526597)

    Reference:
        The time model of Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba. Federated Learning with Buffered
        Asynchronous Aggregation. AISTATS 2022. arXiv:2106.06639.
    """

    seconds: float | Sequence[float]

    def duration(self, job: Job, seed: int) -> int:
        """Drawn by inversion."""
        sigma = self._seconds(job.client) * math.sqrt(math.pi / 2)
        return to_ticks(abs(_NORMAL.inv_cdf(uniform(seed, job))) * sigma)

    def mean_intervals(self, job: Job, interval: int) -> float | None:
        """The sum of the tail, until it no longer changes."""
        per_interval = to_seconds(interval) / (self._seconds(job.client) * math.sqrt(math.pi))
        if per_interval < 1e-4:  # so many terms that the sum is its integral, plus half of the first term
            return self._seconds(job.client) / to_seconds(interval) + 0.5
        total, k = 0.0, 0
        while (term := math.erfc(k * per_interval)) > 1e-18:
            total, k = total + term, k + 1
        return total
