"""`CoordinateMedian`: the median of every coordinate."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from gradwire.federated.aggregators.base import Individual
from gradwire.federated.aggregators.stacks import by_coordinate, middle


@final
@dataclass
class CoordinateMedian(Individual):
    """The median of every coordinate; of an even number of messages, the mean of the two in the middle.

        median_j = median {m_1j, …, m_nj}

    Whatever fewer than half of the clients send, every coordinate stays between two honest values. Weights do not
    count. Of sparse messages it is mostly zero: let clients send dense ones, or estimates such as SCAFCOM's.

    Args:
        None.

    Shapes:
        Messages `[numel]`.

    Cost:
        All messages of a round are kept; one sort of n values per coordinate.

    State:
        None from round to round.

    Example:
        >>> median = CoordinateMedian()
        >>> median.reset(1, torch.float32, torch.device("cpu"))
        >>> for value in (1.0, 2.0, 4.0, 1e9):
        ...     median.add(torch.tensor([value]))
        >>> median.result()
        tensor([3.])

    Reference:
        Yin, Chen, Ramchandran, Bartlett. Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates.
        ICML 2018. arXiv:1803.01498, algorithm 1, option I.
    """

    def tolerates(self, count: int) -> int:
        """Fewer than half."""
        return (count - 1) // 2

    def result(self) -> Tensor:
        """The medians."""
        return by_coordinate(self.stacked, middle)
