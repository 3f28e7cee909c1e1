"""`FedAvg`: the mean of models."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from gradwire.federated.algorithm import Algorithm, Round, Vectors, Weighting


@final
@dataclass(frozen=True)
class FedAvg(Algorithm):
    """Clients train from the server's model, and the server takes the mean of what they end at.

        y_i = x - local training;  x <- x - lr_server sum_i p_i (x - y_i) / sum_i p_i

    With clients that differ it converges to another point than the minimum of the mean loss, the nearer the smaller
    learning rate times local steps.

    Args:
        weighting: p_i: "samples", "uniform", or a function of (client, num_examples).

    Shapes:
        Any model.

    Cost:
        One vector up and one down per client and round.

    State:
        None.

    Example:
        >>> FedAvg().weight(client=0, num_examples=30)
        30.0

    Reference:
        McMahan, Moore, Ramage, Hampson, Agüera y Arcas. Communication-Efficient Learning of Deep Networks from
        Decentralized Data. AISTATS 2017. arXiv:1602.05629, algorithm 1.

    Differences from the paper:
        Means are over the clients that took part, by their own sizes, as in the authors' experiments.
    """

    weighting: Weighting = "samples"

    def server_step(self, mean: Vectors, state: dict[str, Tensor], round: Round) -> Tensor:
        """The mean."""
        return mean["pseudo_gradient"]
