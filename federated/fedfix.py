"""`FedFix`: the server steps at fixed times, with what has arrived by then."""

import math
from dataclasses import dataclass
from typing import final

from gradwire.federated.async_policy import AsyncPolicy, Workforce, per_interval
from gradwire.federated.clock import to_ticks
from gradwire.federated.participation_weights import Weights


@final
@dataclass(frozen=True)
class FedFix(AsyncPolicy):
    """The server steps every so many seconds; clients that are done by then take part, and start anew.

        x <- x - lr_server sum_{i done} omega_i (x_sent - y_i),    omega_i = p_i E ceil(T_i / interval)

    For fixed times tau_i that is `ceil(tau_i / interval) p_i`, for exponential ones
    `p_i / (1 - exp(-interval / tau_i))`. An interval as long as the slowest client's time makes rounds synchronous, a
    short one asynchronous.

    Args:
        interval: Seconds from step to step, > 0. Kept in nanoseconds, so that a client that is done at the very tick is
            never late by rounding.
        weights: "auto", "estimated", "importance" or "identical", see `ParticipationWeights`; "importance" is p_i.
        clip: Of estimated weights, >= 1.

    Cost:
        One vector up and one down for each client that takes part.

    State:
        None but that of estimated weights.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from gradwire.federated.async_policy import Workforce
        >>> from gradwire.federated.client_times import FixedTimes, Job
        >>> workforce = Workforce(FixedTimes([1.0, 2.5]), [Job(client=0), Job(client=1)], concurrency=2, clients=2)
        >>> FedFix(interval=1.0).participation(workforce)
        [1.0, 0.3333333333333333]

    Reference:
        Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
        Clients Updates. JMLR 2023. arXiv:2206.10189, section 5.

    Differences from the paper:
        A tick at which nothing has arrived is no step, and weights are those of the steps that are left: as the
        interval goes to zero they go to those of `AsyncFedAvg`, and not to infinity. Weights for random times are ours.
    """

    interval: float = 1.0
    weights: Weights = "auto"
    clip: float = 20.0

    def __post_init__(self) -> None:
        if not (self.interval > 0 and math.isfinite(self.interval)):
            raise ValueError(f"FedFix: expected a finite interval > 0, got interval={self.interval}.")
        self._check()

    def arrivals_in_step(self, clients: int) -> int:
        """All clients."""
        return clients

    def participation(self, workforce: Workforce) -> list[float] | None:
        """Of steps that a client takes part in."""
        return per_interval(to_ticks(self.interval), workforce)
