"""`FedProx`: local training that is pulled back to the server's model."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from gradwire.federated.algorithm import Algorithm, Correction, Round, Vectors, Weighting


@final
@dataclass(frozen=True)
class FedProx(Algorithm):
    """FedAvg on local losses with a proximal term, so that clients stay near x however long they train.

        clients minimise  f_i(y) + mu/2 ||y - x||^2;  x <- x - lr_server sum_i p_i (x - y_i) / sum_i p_i

    The term is 0 at a client's first step: with one step per round this is FedAvg. Clients that get less far than
    others are kept (`LocalTraining(steps=function)`). A larger mu has less bias and makes less progress.

    Args:
        mu: >= 0; the authors tried 0.001, 0.01, 0.1 and 1, and 0 is FedAvg.
        weighting: p_i: "samples", "uniform", or a function of (client, num_examples).

    Shapes:
        Any model.

    Cost:
        That of FedAvg, and two passes over the parameters in every local step.

    State:
        None.

    Example:
        >>> FedProx(mu=0.1).correction(torch.zeros(2), {}, {}).proximal
        0.1

    Reference:
        Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith. Federated Optimization in Heterogeneous Networks. MLSys 2020.
        arXiv:1812.06127, algorithm 2.

    Differences from the paper:
        Clients are drawn uniformly and weighted by p_i, as in the authors' experiments; the algorithm as printed draws
        by p_i and weights uniformly. The term's gradient goes through the local optimizer's momentum, if it has one.
    """

    mu: float = 0.01
    weighting: Weighting = "samples"

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ValueError(f"FedProx: expected mu >= 0, got mu={self.mu}.")

    def correction(self, start: Tensor, received: Vectors, state: Vectors) -> Correction:
        """The gradient of the proximal term."""
        return Correction(proximal=self.mu)

    def server_step(self, mean: Vectors, state: dict[str, Tensor], round: Round) -> Tensor:
        """The mean."""
        return mean["pseudo_gradient"]
