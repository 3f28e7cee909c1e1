"""`NoFeedback`: what compression loses is lost."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from gradwire.comm.feedback.base import Absence, ErrorFeedback, State


@final
@dataclass(frozen=True)
class NoFeedback(ErrorFeedback):
    """Send the compressed gradient and remember nothing.

        sent_i = C(g_i);  estimate = mean_i sent_i

    Right for lossless and for unbiased compressors, whose error averages out; a biased compressor without feedback
    can diverge (Beznosikov et al. 2020, example 1).

    State:
        None.

    Example:
        >>> NoFeedback().compensate(torch.tensor([[1.0]]), {})
        tensor([[1.]])

    Reference:
        Alistarh, Grubic, Li, Tomioka, Vojnovic. QSGD. NeurIPS 2017. arXiv:1610.02132, algorithm 1.
    """

    needs_mean: ClassVar[bool] = False
    absence: ClassVar[Absence] = "left out"

    def compensate(self, x: Tensor, state: State) -> Tensor:
        """The gradient itself."""
        return x

    def update(self, target: Tensor, sent: Tensor, state: State) -> dict[str, Tensor]:
        """Nothing to remember."""
        return {}

    def estimate(self, mean: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean itself."""
        return mean, {}
