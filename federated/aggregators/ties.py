"""`TIES`: trim, elect a sign, and average those that agree."""

import math
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from gradwire.federated.aggregators.base import Aggregator


@final
@dataclass
class TIES(Aggregator):
    """The mean of the large entries of messages that agree with the sign of their sum.

        trim:   keep the k = ceil(density numel) entries of largest magnitude of each message, and those tied with them
        elect:  s_j = sgn(sum_i w_i m_ij); where that is 0, the sign that most entries of s have
        merge:  lamb times the weighted mean over i of the m_ij of sign s_j

    For messages relative to a common model: pseudo-gradients, or models merged by `merge(…, base=…)`. Meant for one
    round of long local training, and for adapters: in many short rounds it takes small but steady entries for noise.

    Args:
        density: Share of entries that are kept, 0 < density <= 1.
        lamb: Factor of the result, > 0; 0.8 to 2.5 where it can be validated.

    Shapes:
        Messages `[numel]`, of the whole model.

    Cost:
        Sums in float64: 32 bytes per entry. They are of positive parts, negative parts and their weights, so that
        signs need no second pass over messages. One selection per message.

    State:
        The sums.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> ties = TIES(density=0.5)
        >>> ties.reset(4, torch.float32, torch.device("cpu"))
        >>> for values in ([3.0, -2.0, 0.1, 0.0], [1.0, 4.0, -0.2, 0.0], [-2.0, 1.0, 0.3, 0.0]):
        ...     ties.add(torch.tensor(values))
        >>> ties.result()
        tensor([2.0000, 2.5000, 0.0000, 0.0000])

    Reference:
        Yadav, Tam, Choshen, Raffel, Bansal. TIES-Merging: Resolving Interference When Merging Models. NeurIPS 2023.
        arXiv:2306.01708, algorithm 1.

    Differences from the paper:
        Messages may have weights. If signs sum to 0 over all entries, too, entries without a sign are 0, where the
        authors' code takes the negative values: so the result of -m is minus that of m.
    """

    density: float = 0.2
    lamb: float = 1.0
    _sums: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"TIES: expected 0 < density <= 1, got density={self.density}.")
        if not self.lamb > 0:
            raise ValueError(f"TIES: expected lamb > 0, got lamb={self.lamb}.")

    @property
    def linear(self) -> bool:
        """Clients can trim their own messages and part them by sign."""
        return True

    def reset(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """Set the sums to zero."""
        self._sums = torch.zeros((4, numel), dtype=torch.float64, device=device)
        self._count, self._dtype = 0, dtype

    def add(self, message: Tensor, weight: float | Tensor = 1.0) -> None:
        """Trim, and add positive parts, negative parts, and weights of both."""
        if isinstance(weight, Tensor):
            raise ValueError("TIES: expected one weight per message, got one per entry.")
        magnitude, numel = message.abs(), message.numel()
        kept = max(1, math.ceil(self.density * numel))
        threshold = magnitude.kthvalue(numel - kept + 1).values
        trimmed = torch.where(magnitude >= threshold, message, 0.0).double()
        positive, negative = self._sums[:2]
        positive.add_(trimmed.clamp(min=0), alpha=weight)
        negative.add_(trimmed.clamp(max=0), alpha=weight)
        self._sums[2].add_(trimmed > 0, alpha=weight)
        self._sums[3].add_(trimmed < 0, alpha=weight)

    @property
    def sums(self) -> Tensor:
        """Positive parts, negative parts, weights of both."""
        return self._sums.view(-1)

    def result(self) -> Tensor:
        """The means of those that agree."""
        positive, negative, for_positive, for_negative = self._sums
        sign = torch.sign(positive + negative)
        sign = torch.where(sign == 0, sign.sum().sign(), sign)
        total = torch.where(sign > 0, positive, torch.where(sign < 0, negative, 0.0))
        weight = torch.where(sign > 0, for_positive, torch.where(sign < 0, for_negative, 0.0))
        return torch.where(weight > 0, self.lamb * total / weight, 0.0).to(self._dtype)
