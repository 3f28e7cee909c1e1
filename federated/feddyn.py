"""`FedDyn`: local losses that are regularised so that their minima agree."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.federated.algorithm import Algorithm, Correction, LocalWork, Round, Vectors, Weighting


@final
@dataclass(frozen=True)
class FedDyn(Algorithm):
    """Add to each local loss a linear and a quadratic term, so that x is a minimum of all of them at once.

        clients minimise  f_i(y) - <h_i, y> + alpha/2 ||y - x||^2;  h_i <- h_i - alpha (y_i - x)
        h <- h - alpha S/N mean_S (y_i - x);  x <- mean_S y_i - h / alpha

    h_i becomes the client's gradient at the minimum of the mean loss, which it converges to however clients differ. The
    server's x can be poor in early rounds, when h / alpha is not small.

    Args:
        alpha: > 0; the authors use 0.01, and 0.1 and 0.001 beside it. A large alpha keeps clients near x.
        max_norm: Shrink h to this norm where it is longer, > 0: against its growth where clients take part rarely and
            stop training early. h is then no longer the mean of h_i.
        weighting: p_i of means: "uniform", "samples", or a function of (client, num_examples).

    Shapes:
        Any model.

    Cost:
        One vector up and one down per client and round; three passes over the parameters in every local step.

    State:
        control: h_i at every client; h, their mean, at the server.

    Example:
        >>> correction = FedDyn(alpha=0.1).correction(torch.zeros(2), {}, {"control": torch.tensor([1.0, -2.0])})
        >>> correction.vector, correction.proximal
        (tensor([-1.,  2.]), 0.1)

    Reference:
        Acar, Zhao, Matas Navarro, Mattina, Whatmough, Saligrama. Federated Learning Based on Dynamic Regularization.
        ICLR 2021. arXiv:2111.04263, algorithm 1.

    Differences from the paper:
        `max_norm`, and weights p_i, of which the paper's are uniform; h is then the weighted mean of h_i. Local
        training may stop before its minimum; h_i follows what it did.
    """

    alpha: float = 0.01
    max_norm: float | None = None
    weighting: Weighting = "uniform"

    def __post_init__(self) -> None:
        for name, value in (("alpha", self.alpha), ("max_norm", self.max_norm)):
            if value is not None and not value > 0:
                raise ValueError(f"FedDyn: expected {name} > 0, got {name}={value}.")

    @property
    def client_state(self) -> tuple[str, ...]:
        """h_i."""
        return ("control",)

    @property
    def server_state(self) -> tuple[str, ...]:
        """The mean, h."""
        return ("control",)

    def correction(self, start: Tensor, received: Vectors, state: Vectors) -> Correction:
        """The gradients of both terms."""
        return Correction(vector=-state["control"], proximal=self.alpha)

    def commit(self, work: LocalWork, arrived: Vectors) -> dict[str, Tensor]:
        """h_i - alpha (y_i - x)."""
        return {"control": work.state["control"].add(arrived["pseudo_gradient"], alpha=self.alpha)}

    def server_step(self, mean: Vectors, state: dict[str, Tensor], round: Round) -> Tensor:
        """From x to mean y_i - h / alpha; moves h."""
        control, moved = state["control"], mean["pseudo_gradient"]
        control.add_(moved, alpha=self.alpha * round.share)
        if self.max_norm is not None:
            control.mul_(torch.clamp(self.max_norm / control.norm(), max=1.0))
        return moved.add(control, alpha=1 / self.alpha)
