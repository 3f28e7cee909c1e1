"""`EF`: classic error feedback."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from gradwire.comm.feedback.base import ErrorFeedback, Requirement, State, StateTensor
from gradwire.comm.feedback.gains import check_positive, tracking_gain


@final
@dataclass(frozen=True)
class EF(ErrorFeedback):
    """Add what was not sent to the next gradient.

        p_i = g_i + decay e_i;  sent_i = C(p_i);  e_i <- p_i - sent_i;  estimate = mean_i sent_i

    The residual is in gradient units. With a constant learning rate this is the published form, which keeps
    lr * e_i; when the learning rate changes, what is sent late is applied at the new rate.

    Args:
        decay: Share of the residual that is kept, 0 < decay <= 1. 1 is the published algorithm; less forgets, which
            limits how stale a late entry may be and gives up exact conservation.
        dtype: Element type of the residual: "bfloat16" halves its memory; that of the arithmetic by default. What
            rounding takes, up to 2^-8 of an entry in a step, is lost; it is drawn at random, with mean zero, because to
            the nearest a gradient that is small beside its residual would be lost in every step.

    Cost:
        4 bytes of memory per entry (2 in bfloat16), and as much for its coming value, since a step may be skipped;
        reads the gradient and the residual, writes the residual.

    State:
        `residual`, this rank's own.

    Example:
        >>> ef = EF()
        >>> state = {"residual": torch.tensor([[0.5, 0.0]])}
        >>> target = ef.compensate(torch.tensor([[1.0, 0.2]]), state)
        >>> ef.update(target, torch.tensor([[1.5, 0.0]]), state)
        {'residual': tensor([[0.0000, 0.2000]])}

    Reference:
        Seide, Fu, Droppo, Li, Yu. 1-Bit Stochastic Gradient Descent. Interspeech 2014;
        Stich, Cordonnier, Jaggi. Sparsified SGD with Memory. NeurIPS 2018. arXiv:1809.07599, algorithm 1;
        Karimireddy, Rebjock, Stich, Jaggi. Error Feedback Fixes SignSGD. ICML 2019. arXiv:1901.09847, algorithm 2.

    Differences from the paper:
        Gradient units, as above, and the optional decay (used by SparseLoCo).
    """

    decay: float = 1.0
    dtype: Literal["bfloat16"] | None = None

    state: ClassVar[tuple[StateTensor, ...]] = (StateTensor("residual"),)
    requires: ClassVar[Requirement] = "contraction"

    def __post_init__(self) -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"EF: expected 0 < decay <= 1, got decay={self.decay}.")

        if self.dtype not in (None, "bfloat16"):
            raise ValueError(f"EF: expected dtype 'bfloat16' or None, got dtype={self.dtype!r}.")

    def __repr__(self) -> str:
        return f"EF(decay={self.decay})" if self.dtype is None else f"EF(decay={self.decay}, dtype={self.dtype!r})"

    @property
    def state_tensors(self) -> tuple[StateTensor, ...]:
        """The residual, in its element type."""
        return (StateTensor("residual", dtype=torch.bfloat16 if self.dtype else None),)

    def compensate(self, x: Tensor, state: State) -> Tensor:
        """Gradient plus residual."""
        return x.add(state["residual"], alpha=self.decay)

    def update(self, target: Tensor, sent: Tensor, state: State) -> dict[str, Tensor]:
        """What was not sent."""
        return {"residual": target.sub_(sent)}

    def estimate(self, mean: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of what was sent."""
        return mean, {}

    @staticmethod
    def max_stepsize(*, L: float, alpha: float) -> float:
        """Largest step size for which descent is proven to come near a stationary point: 1 / (L (1 + xi)).

        With xi = sqrt(1 - alpha) / (1 - sqrt(1 - alpha)). How near depends on how much gradients differ between
        workers: what is left is of the order (step size)^2. `EControl` and `EF21` leave nothing of that.

        Args:
            L: Smoothness constant of the mean of all functions, > 0.
            alpha: Contraction of the compressor, 0 < alpha <= 1.

        Raises:
            ValueError: a value is out of range.

        Example:
            >>> EF.max_stepsize(L=1.0, alpha=0.75)
            0.5

        Reference:
            `gains` and the virtual iterate of Stich et al. 2018: y = x - lr mean_i e_i takes exact steps, and
            ||e|| <= xi ||g|| since |e| <= q (|e| + |g|), so f(y) falls where lr L + (lr L xi)^2 <= 1.
        """
        check_positive(L=L)
        return 1 / (L * (1 + tracking_gain(alpha)))
