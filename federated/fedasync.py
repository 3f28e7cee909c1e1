"""`FedAsync`: the server mixes every client's model into its own, the less the staler it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

from gradwire.federated.async_policy import AsyncPolicy, Staleness, Workforce, per_arrival
from gradwire.federated.participation_weights import Weights


@final
@dataclass(frozen=True)
class FedAsync(AsyncPolicy):
    """Every message is a step of the server, of size alpha, discounted by the staleness of its model.

        x <- x - alpha s(u) omega_i (x_sent - y_i)                          delta_from="sent"
        x <- (1 - alpha s(u) omega_i) x + alpha s(u) omega_i y_i            delta_from="current"

    `FedAsync(delta_from="current", weights="identical")` with the algorithm `FedProx(mu=0.005)` is the published
    method. A stale model mixed in pulls x back to where it was sent from; pseudo-gradients from the model that was sent
    do not.

    Args:
        alpha: 0 < alpha <= 1; a number, or a function of the server's step, counted from 0.
        staleness: s(u): "constant", "polynomial" (1 + u)^-0.5, "hinge" 1 up to u = 4 and then 1 / (10 (u - 4) + 1), or
            a function of u with values > 0.
        max_staleness: Staler messages are dropped, >= 0; None for none.
        delta_from: Which model the client's counts from.
        weights: "auto", "estimated", "importance" or "identical", see `ParticipationWeights`. A weight may make a step
            larger than alpha.
        clip: Of estimated weights, >= 1.

    Cost:
        One vector up and one down per step.

    State:
        None but that of estimated weights.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> FedAsync(alpha=0.6).scale(0), FedAsync(staleness="hinge").discount(10)
        (0.6, 0.01639344262295082)

    Reference:
        Xie, Koyejo, Gupta. Asynchronous Federated Optimization. OPT 2020. arXiv:1903.03934, algorithm 1, section 5.

    Differences from the paper:
        Pseudo-gradients count from the model that was sent, and weights keep the optimum, by default.
    """

    alpha: float | Callable[[int], float] = 0.6
    staleness: Staleness = "polynomial"
    max_staleness: int | None = None
    delta_from: Literal["sent", "current"] = "sent"
    weights: Weights = "auto"
    clip: float = 20.0

    def __post_init__(self) -> None:
        self._check()
        if not callable(self.alpha) and not 0 < self.alpha <= 1:
            raise ValueError(f"FedAsync: expected 0 < alpha <= 1, got alpha={self.alpha}.")

    def scale(self, step: int) -> float:
        """Alpha."""
        return self.alpha(step) if callable(self.alpha) else self.alpha

    def participation(self, workforce: Workforce) -> list[float] | None:
        """The client's share of all finished jobs."""
        return per_arrival(1, 1, workforce)
