"""`DIANA`: unbiased compression of differences."""

from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

from torch import Tensor

from gradwire.comm.feedback.base import ErrorFeedback, Requirement, State, StateTensor
from gradwire.comm.feedback.gains import check_positive
from gradwire.compression.base import Compressor

_NUMEL = 1 << 20


@final
@dataclass(frozen=True)
class DIANA(ErrorFeedback):
    """Compress, without bias, how far the gradient is from a value that learns it.

        sent_i = Q(g_i - h_i);  h_i <- h_i + rate sent_i;  estimate = H + mean_i sent_i;  H <- H + rate mean_i sent_i

    The estimate is unbiased, and its error vanishes as h_i comes near to the gradient at the optimum, where plain
    unbiased compression leaves an error as large as workers differ.

    Args:
        rate: How far h_i moves, 0 < rate <= 1. 1 / (1 + omega) by default, omega being the compressor's.

    Cost:
        8 bytes of memory per entry; reads the gradient and h, writes h; reads and writes H.

    State:
        `local` (h_i), this rank's own; `mean` (H), equal on all ranks. Both start at zero.

    Example:
        >>> diana = DIANA(rate=0.5)
        >>> state = {"local": torch.tensor([[1.0]]), "mean": torch.tensor([[2.0]])}
        >>> diana.update(torch.tensor([[3.0]]), torch.tensor([[4.0]]), state)
        {'local': tensor([[3.]])}
        >>> diana.estimate(torch.tensor([[4.0]]), state)[0]
        tensor([[6.]])

    Reference:
        Mishchenko, Gorbunov, Takac, Richtarik. Distributed Learning with Compressed Gradient Differences. 2019.
        arXiv:1901.09269, algorithm 1.
    """

    rate: float | None = None

    state: ClassVar[tuple[StateTensor, ...]] = (StateTensor("local"), StateTensor("mean", replicated=True))
    requires: ClassVar[Requirement] = "unbiased"

    def __post_init__(self) -> None:
        if self.rate is not None and not 0 < self.rate <= 1:
            raise ValueError(f"DIANA: expected 0 < rate <= 1, got rate={self.rate}.")

    def fit(self, compressor: Compressor) -> Self:
        """Choose the rate by the compressor's omega."""
        omega = compressor.omega(_NUMEL)
        return replace(self, rate=1 / (1 + omega)) if self.rate is None and omega is not None else self

    @property
    def _rate(self) -> float:
        assert self.rate is not None, "fit sets it"
        return self.rate

    def compensate(self, x: Tensor, state: State) -> Tensor:
        """Gradient minus what is known of it."""
        return x.sub(state["local"])

    def update(self, target: Tensor, sent: Tensor, state: State) -> dict[str, Tensor]:
        """Move what is known by a share of what was sent."""
        return {"local": sent.mul_(self._rate).add_(state["local"])}

    def estimate(self, mean: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """What is known of the mean, plus the mean of what was sent."""
        return mean + state["mean"], {"mean": state["mean"].add(mean, alpha=self._rate)}

    @staticmethod
    def max_stepsize(*, L: float, omega: float, workers: int) -> float:
        """Largest step size for which descent on strongly convex functions is proven linear: 1 / (L (1 + 6 omega / n)).

        Args:
            L: The largest smoothness constant of a worker, > 0.
            omega: Of the compressor, its `omega(numel)`.
            workers: Their number n; 1 if all ranks draw alike (`RandomK`), for then errors do not average out.

        Raises:
            ValueError: a value is out of range.

        Example:
            >>> DIANA.max_stepsize(L=1.0, omega=3.0, workers=2)
            0.1

        Reference:
            Gorbunov, Hanzely, Richtarik. A Unified Theory of SGD. AISTATS 2020. arXiv:1905.11261, where DIANA has
            A = (1 + 2 omega / n) L, B = 2 omega / n, C = rate L, and rate = 1 / (1 + omega): 1 / (A + 2 B C / rate).
        """
        check_positive(L=L, workers=workers)
        return 1 / (L * (1 + 6 * omega / workers))
