"""`Krum`, `MultiKrum`: messages that have near neighbours."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.federated.aggregators.base import Individual
from gradwire.federated.aggregators.stacks import combine, sort_rows, squared_distances


class _ByNeighbours(Individual):
    """What Krum and Multi-Krum have in common."""

    byzantine: int

    def __post_init__(self) -> None:
        if not self.byzantine >= 0:
            raise ValueError(f"{type(self).__name__}: expected byzantine >= 0, got byzantine={self.byzantine}.")

    @property
    def fewest(self) -> int:
        """2 f + 3."""
        return 2 * self.byzantine + 3

    def check(self, count: int) -> None:
        """Raise ValueError if `count` messages are too few."""
        if count < self.fewest:
            most = (count - 3) // 2
            remedy = f", or byzantine <= {most}" if most >= 0 else ""
            raise ValueError(
                f"{type(self).__name__}: expected at least 2 byzantine + 3 = {self.fewest} messages in a round, got "
                f"{count}. Take a larger cohort{remedy}."
            )

    def tolerates(self, count: int) -> int:
        """As many as `byzantine` says."""
        return self.byzantine

    def order(self, stacked: Tensor) -> Tensor:
        """Messages by score, the lowest first, those of equal score as they came: int64 `[clients]`."""
        near = len(stacked) - self.byzantine - 2
        scores = sort_rows(squared_distances(stacked))[:, :near].sum(1)
        return scores.argsort(stable=True)


@final
@dataclass
class Krum(_ByNeighbours):
    """The message whose nearest neighbours are nearest.

        score_i = sum of |m_i - m_j|^2 over the n - f - 2 messages j nearest to i;  the m_i of the lowest score

    Needs n >= 2 f + 3. Weights do not count. It passes one client's message on as it is, so its variance is that of one
    client: `MultiKrum` takes the mean of several.

    Args:
        byzantine: f, clients that may send anything, >= 0.

    Shapes:
        Messages `[numel]`.

    Cost:
        All messages of a round are kept; n^2 numel multiplications in float64.

    State:
        None from round to round.

    Raises:
        ValueError: byzantine is negative.

    Example:
        >>> krum = Krum(byzantine=1)
        >>> krum.reset(1, torch.float32, torch.device("cpu"))
        >>> for value in (1.0, 2.0, 2.5, 4.0, 1e9):
        ...     krum.add(torch.tensor([value]))
        >>> krum.result()
        tensor([2.])

    Reference:
        Blanchard, El Mhamdi, Guerraoui, Stainer. Machine Learning with Adversaries: Byzantine Tolerant Gradient
        Descent. NeurIPS 2017. arXiv:1703.02757, section 4.
    """

    byzantine: int

    def result(self) -> Tensor:
        """The message."""
        stacked = self.stacked
        return stacked.index_select(0, self.order(stacked)[:1])[0]


@final
@dataclass
class MultiKrum(_ByNeighbours):
    """The mean of the m messages whose nearest neighbours are nearest.

        score_i as Krum's;  mean of the m messages of the lowest scores

    Needs n >= 2 f + 3. Weights do not count.

    Args:
        byzantine: f, clients that may send anything, >= 0.
        m: Messages that are kept, 1 <= m <= n - f; n - f by default.

    Shapes:
        Messages `[numel]`.

    Cost:
        All messages of a round are kept; n^2 numel multiplications in float64.

    State:
        None from round to round.

    Raises:
        ValueError: byzantine is negative, or m < 1.

    Example:
        >>> krum = MultiKrum(byzantine=1, m=2)
        >>> krum.reset(1, torch.float32, torch.device("cpu"))
        >>> for value in (1.0, 2.0, 2.5, 4.0, 1e9):
        ...     krum.add(torch.tensor([value]))
        >>> krum.result()
        tensor([2.2500])

    Reference:
        Blanchard, El Mhamdi, Guerraoui, Stainer. Machine Learning with Adversaries: Byzantine Tolerant Gradient
        Descent. NeurIPS 2017. arXiv:1703.02757, section 4.
    """

    byzantine: int
    m: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.m is not None and not self.m >= 1:
            raise ValueError(f"MultiKrum: expected m >= 1, got m={self.m}.")

    def check(self, count: int) -> None:
        """Raise ValueError if `count` messages are too few."""
        super().check(count)
        if self.m is not None and self.m > count - self.byzantine:
            raise ValueError(
                f"MultiKrum: expected m <= {count - self.byzantine}, messages of a round less byzantine, got "
                f"m={self.m}. Take a larger cohort, or a smaller m."
            )

    def result(self) -> Tensor:
        """The mean."""
        stacked = self.stacked
        m = len(stacked) - self.byzantine if self.m is None else self.m
        weights = torch.zeros(len(stacked), dtype=torch.float64, device=stacked.device)
        weights[self.order(stacked)[:m]] = 1 / m
        return combine(stacked, weights).to(stacked.dtype)
