"""`AsyncFedAvg`: a server step for every client that answers."""

from dataclasses import dataclass
from typing import final

from gradwire.federated.async_policy import AsyncPolicy, Workforce, per_arrival
from gradwire.federated.participation_weights import Weights


@final
@dataclass(frozen=True)
class AsyncFedAvg(AsyncPolicy):
    """Every message is a step of the server, weighted so that the optimum is that of synchronous `FedAvg`.

        x <- x - lr_server d_i p_i (x_sent - y_i),    d_i = sum_j 1 / tau_j times tau_i, all clients being at work

    Without d_i the server minimises `sum_i f_i / tau_i`: a client that answers twice as often counts twice. With fewer
    clients at work than there are, `completion_shares` takes the place of 1 / tau_i.

    Args:
        weights: "auto", "estimated", "importance" or "identical", see `ParticipationWeights`.
        clip: Of estimated weights, >= 1.

    Cost:
        One vector up and one down per step.

    State:
        None but that of estimated weights.

    Example:
        >>> AsyncFedAvg().discount(7)
        1.0

    Reference:
        Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
        Clients Updates. JMLR 2023. arXiv:2206.10189, section 4.
    """

    weights: Weights = "auto"
    clip: float = 20.0

    def __post_init__(self) -> None:
        self._check()

    def participation(self, workforce: Workforce) -> list[float] | None:
        """The client's share of all finished jobs."""
        return per_arrival(1, 1, workforce)
