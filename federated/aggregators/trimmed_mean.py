"""`TrimmedMean`: the mean of every coordinate without its extremes."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.federated.aggregators.base import Individual
from gradwire.federated.aggregators.stacks import by_coordinate


@final
@dataclass
class TrimmedMean(Individual):
    """The mean of every coordinate, without its smallest and its largest values.

        k = floor(beta n);  mean of m_(k+1)j <= … <= m_(n-k)j

    Whatever k clients send, every coordinate stays between two honest values. Weights do not count.

    Args:
        beta: Share of messages left out at either end, 0 <= beta < 1/2; at least the share of Byzantine clients.

    Shapes:
        Messages `[numel]`.

    Cost:
        All messages of a round are kept; one sort of n values per coordinate.

    State:
        None from round to round.

    Raises:
        ValueError: beta is out of range.

    Example:
        >>> mean = TrimmedMean(beta=0.2)
        >>> mean.reset(1, torch.float32, torch.device("cpu"))
        >>> for value in (1.0, 2.0, 3.0, 4.0, 100.0):
        ...     mean.add(torch.tensor([value]))
        >>> mean.result()
        tensor([3.])

    Reference:
        Yin, Chen, Ramchandran, Bartlett. Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates.
        ICML 2018. arXiv:1803.01498, algorithm 1, option II.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 0.5:
            raise ValueError(f"TrimmedMean: expected 0 <= beta < 0.5, got beta={self.beta}.")

    def tolerates(self, count: int) -> int:
        """As many as are left out at either end."""
        return math.floor(self.beta * count)

    def result(self) -> Tensor:
        """The means."""
        stacked = self.stacked
        cut = self.tolerates(len(stacked))
        return by_coordinate(stacked, lambda values: values[:, cut : len(stacked) - cut].mean(1, dtype=torch.float64))
