"""`Bulyan`: Krum's choices, then the values around their median."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.federated.aggregators.base import Individual
from gradwire.federated.aggregators.stacks import by_coordinate, middle, squared_distances


@final
@dataclass
class Bulyan(Individual):
    """Choose messages by Krum, one after the other, then average those values of a coordinate nearest to its median.

        choose n - 2 f messages: n - 2 f times, Krum's choice of those left, each by its r - f - 2 nearest of r left
        mean of the n - 4 f values of a coordinate nearest to the median of those chosen

    Needs n >= 4 f + 3. Krum bounds how far a message is off as a whole, but not in a single coordinate of many; the
    second stage does. Weights do not count.

    Args:
        byzantine: f, clients that may send anything, >= 0.

    Shapes:
        Messages `[numel]`.

    Cost:
        All messages of a round are kept; n^2 numel multiplications in float64, n^3 operations for the choice, one sort
        of n values per coordinate.

    State:
        None from round to round.

    Raises:
        ValueError: byzantine is negative.

    Example:
        >>> bulyan = Bulyan(byzantine=1)
        >>> bulyan.reset(1, torch.float32, torch.device("cpu"))
        >>> for value in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1e9):
        ...     bulyan.add(torch.tensor([value]))
        >>> bulyan.result()
        tensor([4.])

    Reference:
        El Mhamdi, Guerraoui, Rouault. The Hidden Vulnerability of Distributed Learning in Byzantium. ICML 2018.
        arXiv:1802.07927, section 4.

    Differences from the paper:
        When few messages are left to choose from, Krum's score would be a sum over one or none, and two that are
        nearest to one another would tie: it goes over two at least.
    """

    byzantine: int

    def __post_init__(self) -> None:
        if not self.byzantine >= 0:
            raise ValueError(f"Bulyan: expected byzantine >= 0, got byzantine={self.byzantine}.")

    @property
    def fewest(self) -> int:
        """4 f + 3."""
        return 4 * self.byzantine + 3

    def check(self, count: int) -> None:
        """Raise ValueError if `count` messages are too few."""
        if count < self.fewest:
            most = (count - 3) // 4
            remedy = f", or byzantine <= {most}" if most >= 0 else ""
            raise ValueError(
                f"Bulyan: expected at least 4 byzantine + 3 = {self.fewest} messages in a round, got {count}. Take a "
                f"larger cohort{remedy}."
            )

    def tolerates(self, count: int) -> int:
        """As many as `byzantine` says."""
        return self.byzantine

    def result(self) -> Tensor:
        """The means."""
        stacked = self.stacked
        count = len(stacked) - 2 * self.byzantine
        chosen = stacked[self._choose(stacked, count)] if self.byzantine else stacked
        kept = count - 2 * self.byzantine
        return by_coordinate(chosen, lambda values: _around_median(values, kept))

    def _choose(self, stacked: Tensor, count: int) -> Tensor:
        """The messages that Krum chooses one after the other, in order of their arrival."""
        distances = squared_distances(stacked)
        order = distances.argsort(dim=1, stable=True)
        ranked = distances.gather(1, order)
        left = torch.ones(len(stacked), dtype=torch.bool, device=stacked.device)
        infinity = torch.full((), float("inf"), dtype=torch.float64, device=stacked.device)
        for remaining in range(len(stacked), len(stacked) - count, -1):
            near = max(2, remaining - self.byzantine - 2)
            there = left[order]
            nearest = there & (there.cumsum(1) <= near)
            scores = torch.where(nearest, ranked, 0.0).sum(1).clamp_(max=torch.finfo(torch.float64).max)
            left[torch.where(left, scores, infinity).argmin()] = False
        return (~left).nonzero()[:, 0]


def _around_median(values: Tensor, kept: int) -> Tensor:
    """The mean of the `kept` values nearest to the median of sorted rows: they lie side by side."""
    medians, starts = middle(values)[:, None], values.shape[1] - kept + 1
    below = medians - values[:, :starts].double()
    above = values[:, kept - 1 :].double() - medians
    first = torch.maximum(below, above).argmin(1, keepdim=True)
    columns = first + torch.arange(kept, device=values.device)
    return values.gather(1, columns).mean(1, dtype=torch.float64)
