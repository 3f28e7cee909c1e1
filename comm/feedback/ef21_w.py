"""`EF21W`: EF21 with workers weighted by their smoothness."""

from dataclasses import dataclass
from typing import ClassVar, final

from gradwire.comm.feedback.base import Absence
from gradwire.comm.feedback.ef21 import EF21
from gradwire.comm.feedback.tracking import Tracking


@final
@dataclass(frozen=True)
class EF21W(Tracking):
    """Track gradients divided by weights that grow with each worker's smoothness constant, and weight their mean.

        w_i = L_i / sum_j L_j;  sent_i = C(g_i / (n w_i) - h_i);  h_i <- h_i + sent_i
        H <- H + sum_i w_i sent_i;  estimate = H

    The weights even out how fast tracked values change, so the step size depends on the arithmetic mean of the L_i and
    not on their quadratic mean, which can be sqrt(n) times as large. For compressors with C(a x) = a C(x) for a > 0, as
    `TopK`, `ScaledSign` and `BlockQuantize`, it makes the same steps as `EF21`, for which the same step size is proven
    by way of it; for others (thresholds, rounding to powers of two) it is another algorithm.

    Args:
        smoothness: L_i > 0 of every worker in rank order, equal on all ranks; `estimate_smoothness` finds one.
        dense_start: As in `EF21`.

    Cost:
        As `EF21`, and one multiplication per entry; payloads are decompressed one by one, since weights differ.

    State:
        `local` (h_i), this rank's own; `mean` (H), equal on all ranks.

    Example:
        >>> EF21W(smoothness=(1.0, 3.0)).weights
        (0.5, 1.5)

    Reference:
        Richtarik, Gasanov, Burlachenko. Error Feedback Reloaded: From Quadratic to Arithmetic Mean of Smoothness
        Constants. ICLR 2024. arXiv:2402.10774, algorithm 2.
    """

    smoothness: tuple[float, ...]
    dense_start: bool = False

    absence: ClassVar[Absence] = "unchanged"

    def __post_init__(self) -> None:
        if not self.smoothness or not all(0 < value < float("inf") for value in self.smoothness):
            raise ValueError(f"EF21W: expected a finite smoothness > 0 of every worker, got {self.smoothness}.")

    @property
    def weights(self) -> tuple[float, ...]:  # type: ignore[override]
        """The weights times n: L_i / mean_j L_j."""
        mean = sum(self.smoothness) / len(self.smoothness)
        return tuple(value / mean for value in self.smoothness)

    @staticmethod
    def max_stepsize(*, L: float, alpha: float, L_mean: float | None = None, participation: float = 1.0) -> float:
        """Largest step size for which gradient descent is proven to converge: 1 / (L + xi L_mean).

        Args:
            L: Smoothness constant of the mean of all functions, > 0.
            alpha: Contraction of the compressor, 0 < alpha <= 1.
            L_mean: Arithmetic mean of `smoothness`; L if they are all alike.
            participation: Share of the workers that takes part in a step.

        Raises:
            ValueError: a value is out of range.

        Example:
            >>> EF21W.max_stepsize(L=1.0, alpha=1.0)
            1.0

        Reference:
            Richtarik, Gasanov, Burlachenko 2024, theorem 2.
        """
        return EF21.max_stepsize(L=L, alpha=alpha, L_mean=L_mean, participation=participation)
