"""`WeightedMean`: the mean that FedAvg takes."""

from dataclasses import dataclass, field
from typing import ClassVar, final

import torch
from torch import Tensor

from gradwire.federated.aggregators.base import Aggregator


@final
@dataclass
class WeightedMean(Aggregator):
    """The weighted mean of messages.

        sum_i w_i m_i / sum_i w_i

    With a weight per entry, the mean goes over the clients that have the entry: the coverage-weighted mean of models
    of several sizes, the masked mean of sparse models, and Fisher-weighted averaging. Entries without weight are zero.

    Args:
        by_entry: Whether messages may have a weight for every entry.

    Shapes:
        Messages `[numel]`; weights 0-d or `[numel]`.

    Cost:
        Sums in float64: 8 bytes per entry, 16 with weights per entry; one pass per message. Summing float32 messages in
        float64 makes the result the same, but for a rounding in 2^29, in whatever order they come.

    State:
        The sums.

    Example:
        >>> mean = WeightedMean()
        >>> mean.reset(2, torch.float32, torch.device("cpu"))
        >>> mean.add(torch.tensor([1.0, 0.0]), 3.0)
        >>> mean.add(torch.tensor([5.0, 2.0]), 1.0)
        >>> mean.result()
        tensor([2.0000, 0.5000])

    Reference:
        McMahan et al. Communication-Efficient Learning of Deep Networks from Decentralized Data. AISTATS 2017.
        arXiv:1602.05629, algorithm 1; by entry, Diao, Ding, Tarokh. HeteroFL. ICLR 2021. arXiv:2010.01264, section 3.
    """

    linear = True
    averages: ClassVar[bool] = True
    by_entry: bool = False
    _sums: Tensor = field(init=False, repr=False)
    _dtype: torch.dtype = field(init=False, repr=False)

    def reset(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """Set the sums to zero."""
        size = 2 * numel if self.by_entry else numel + 1
        if not hasattr(self, "_sums") or self._sums.shape != (size,) or self._sums.device != device:
            self._sums = torch.zeros(size, dtype=torch.float64, device=device)
        else:
            self._sums.zero_()
        self._total, self._weights = self._sums[:numel], self._sums[numel:]
        self._weight, self._dtype = 0.0, dtype

    def add(self, message: Tensor, weight: float | Tensor = 1.0) -> None:
        """Add weight times message."""
        if not isinstance(weight, Tensor):
            self._total.add_(message, alpha=weight)
            self._weight += weight
            return
        if not self.by_entry:
            raise ValueError("WeightedMean: expected one weight, got a tensor. Set by_entry=True.")
        self._total.addcmul_(message.double(), weight.double())
        self._weights += weight

    @property
    def sums(self) -> Tensor:
        """Weighted messages, then weights."""
        if self._weight:
            self._weights += self._weight
            self._weight = 0.0
        return self._sums

    def result(self) -> Tensor:
        """The mean."""
        sums, numel = self.sums, self._total.numel()
        total, weights = sums[:numel], sums[numel:]
        mean = torch.where(weights > 0, total / weights, 0.0) if self.by_entry else total / weights
        if not self.by_entry and not float(weights) > 0:
            raise ValueError("WeightedMean: expected a positive sum of weights, got 0.")
        return mean.to(self._dtype)
