"""`NormClipping`: no message longer than a bound."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from gradwire.federated.aggregators.base import Aggregator
from gradwire.federated.aggregators.weighted_mean import WeightedMean


@final
@dataclass
class NormClipping(Aggregator):
    """Shorten messages to a norm before another rule takes them.

        m_i <- m_i min(1, max_norm / |m_i|)

    With a mean, f of n clients of equal weight move the result by at most 2 max_norm f / n.

    Args:
        max_norm: Euclidean, of a whole message, > 0.
        then: The rule; the weighted mean by default.

    Shapes:
        Messages `[numel]`; weights as `then` takes them.

    Cost:
        One pass over a message more than `then`.

    State:
        That of `then`.

    Raises:
        ValueError: max_norm is out of range.

    Example:
        >>> clipping = NormClipping(max_norm=5.0)
        >>> clipping.reset(2, torch.float32, torch.device("cpu"))
        >>> clipping.add(torch.tensor([0.0, 2.0]))
        >>> clipping.add(torch.tensor([30.0, 40.0]))
        >>> clipping.result()
        tensor([1.5000, 3.0000])

    Reference:
        Sun, Kairouz, Suresh, McMahan. Can You Really Backdoor Federated Learning? 2019. arXiv:1911.07963, section 4.
    """

    max_norm: float
    then: Aggregator = field(default_factory=WeightedMean)

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise ValueError(f"NormClipping: expected max_norm > 0, got max_norm={self.max_norm}.")

    @property
    def linear(self) -> bool:
        """As `then`: clients can clip their own messages."""
        return self.then.linear

    @property
    def weighs(self) -> bool:
        """As `then`."""
        return self.then.weighs

    @property
    def passes(self) -> int:
        """As `then`."""
        return self.then.passes

    @property
    def fewest(self) -> int:
        """As `then`."""
        return self.then.fewest

    def check(self, count: int) -> None:
        """As `then`."""
        self.then.check(count)

    def tolerates(self, count: int) -> int:
        """Fewer than half, as the result is no longer than `max_norm`, or what `then` does."""
        return max((count - 1) // 2, self.then.tolerates(count))

    def reset(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """Begin a round."""
        self.then.reset(numel, dtype, device)

    def add(self, message: Tensor, weight: float | Tensor = 1.0) -> None:
        """Clip and hand on."""
        norm = torch.linalg.vector_norm(message, dtype=torch.float64)
        self.then.add(message * (self.max_norm / norm).clamp(max=1.0), weight)

    @property
    def sums(self) -> Tensor:
        """Those of `then`."""
        return self.then.sums

    def result(self) -> Tensor:
        """What `then` makes of them."""
        return self.then.result()

    def state_dict(self) -> dict[str, Any]:
        """That of `then`."""
        return self.then.state_dict()

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self.then.load_state_dict(saved)
