"""`CenteredClipping`: no message farther than a bound from the previous aggregate."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from gradwire.federated.aggregators.base import Individual
from gradwire.federated.aggregators.stacks import combine, distances_to


@final
@dataclass
class CenteredClipping(Individual):
    """Start at the previous round's aggregate, and take the mean of messages clipped around it.

        v <- the previous result, zero at first
        repeat:  v <- v + sum_i w_i (m_i - v) min(1, tau / |m_i - v|)

    Weights count, over their sum. One round moves it by at most tau times iterations; attacks that add up over rounds
    are met by what the server remembers and, in the paper, by momentum at the clients.

    Args:
        tau: Radius, > 0.
        iterations: >= 1; 1 to 3 are usual.

    Shapes:
        Messages `[numel]`.

    Cost:
        All messages of a round are kept; two passes over them per iteration.

    State:
        previous: The result of the last round that had messages, `[numel]`, float64.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> clipping = CenteredClipping(tau=1.0, iterations=1)
        >>> for _ in range(2):
        ...     clipping.reset(1, torch.float32, torch.device("cpu"))
        ...     for value in (1.0, 1.0, 1e9):
        ...         clipping.add(torch.tensor([value]))
        ...     clipping.result()
        tensor([1.])
        tensor([1.3333])

    Reference:
        Karimireddy, He, Jaggi. Learning from History for Byzantine Robust Optimization. ICML 2021. arXiv:2012.10333,
        algorithm 1.
    """

    tau: float = 10.0
    iterations: int = 3
    weighs = True
    _start: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    _last: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.tau > 0:
            raise ValueError(f"CenteredClipping: expected tau > 0, got tau={self.tau}.")
        if not self.iterations >= 1:
            raise ValueError(f"CenteredClipping: expected iterations >= 1, got iterations={self.iterations}.")

    @property
    def passes(self) -> int:
        """One an iteration: clients can clip around what the server sends."""
        return self.iterations

    def tolerates(self, count: int) -> int:
        """Fewer than half, of equal weights."""
        return (count - 1) // 2

    def reset(self, numel: int, dtype: torch.dtype, device: torch.device) -> None:
        """Begin a round at the previous result."""
        super().reset(numel, dtype, device)
        if self._last is None or self._last.shape != (numel,):
            self._last = torch.zeros(numel, dtype=torch.float64)
        self._start = self._last = self._last.to(device)

    def result(self) -> Tensor:
        """The mean around the previous result."""
        stacked, shares, point = self.stacked, self.shares, self._start
        assert point is not None
        for _ in range(self.iterations):
            pull = (self.tau / distances_to(stacked, point)).clamp_(max=1.0).mul_(shares)
            point = combine(stacked, pull).add_(point * (1 - pull.sum()))
        self._last = point
        return point.to(stacked.dtype, copy=True)

    def state_dict(self) -> dict[str, Any]:
        """The last result."""
        return {} if self._last is None else {"previous": self._last}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        if saved and saved.keys() != {"previous"}:
            raise ValueError(f"CenteredClipping: expected state of ['previous'], got {sorted(saved)}.")
        self._last = saved["previous"].to(torch.float64, copy=True) if saved else None
