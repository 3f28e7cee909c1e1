"""`FedBuff`: the server steps once its buffer of messages is full."""

from dataclasses import dataclass
from typing import final

from gradwire.federated.async_policy import AsyncPolicy, Staleness, Workforce, per_arrival
from gradwire.federated.participation_weights import Weights


@final
@dataclass(frozen=True)
class FedBuff(AsyncPolicy):
    """The server adds messages to a buffer and makes a step with every K of them.

        x <- x - lr_server sum_{i in buffer} omega_i s(u_i) (x_sent - y_i)

    `weights="identical"`, omega_i = 1 / K, is the published method; it minimises a mean of losses in which fast clients
    count more. The buffer is a sum: the server need not see any client's message.

    Args:
        buffer: K, >= 1.
        staleness: s(u): "polynomial" (1 + u)^-0.5, "constant", "hinge", or a function of u with values > 0.
        max_staleness: Staler messages are dropped, >= 0; None for none.
        open_slots: Free places at which new clients begin, >= 1: with 1, as published, another client begins when one
            is done; with `buffer`, those in the buffer wait for the server's step; with `buffer` and a concurrency as
            large, rounds are synchronous.
        weights: "auto", "estimated", "importance" or "identical", see `ParticipationWeights`.
        clip: Of estimated weights, >= 1.

    Cost:
        A sum in float64: 8 bytes per parameter. K vectors up and down per step. With C clients at work and one free
        place filled at once, messages are about (C - 1) / K steps old.

    State:
        None between steps, but that of estimated weights.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> [round(FedBuff(buffer=10).discount(u), 4) for u in (0, 3, 8)]
        [1.0, 0.5, 0.3333]

    Reference:
        Nguyen, Malik, Zhan, Yousefpour, Rabbat, Malek, Huba. Federated Learning with Buffered Asynchronous Aggregation.
        AISTATS 2022. arXiv:2106.06639, algorithm 1.

    Differences from the paper:
        Weights keep the optimum by default, and make up for a discount that hits slow clients more.
    """

    buffer: int = 10
    staleness: Staleness = "polynomial"
    max_staleness: int | None = None
    open_slots: int = 1
    weights: Weights = "auto"
    clip: float = 20.0

    def __post_init__(self) -> None:
        if self.buffer < 1:
            raise ValueError(f"FedBuff: expected buffer >= 1, got buffer={self.buffer}.")
        self._check()

    def arrivals_in_step(self, clients: int) -> int:
        """K."""
        return self.buffer

    def participation(self, workforce: Workforce) -> list[float] | None:
        """Shares of finished jobs, or those of a cohort."""
        return per_arrival(self.buffer, self.open_slots, workforce)
