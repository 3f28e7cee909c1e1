"""`DecoupledMomentum`: the momentum is the error feedback."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from gradwire.comm.feedback.base import ErrorFeedback, Requirement, State, StateTensor


@final
@dataclass(frozen=True)
class DecoupledMomentum(ErrorFeedback):
    """Let every rank keep a momentum of its own, send its largest part, and take what was sent out of it.

        p_i = decay m_i + w g_i;  sent_i = C(p_i);  m_i <- p_i - alpha sent_i;  estimate = mean_i sent_i

    with w = 1, or 1 - decay if `ema`. Fast parts of the momentum are exchanged soon, slow ones gather until they are
    large. With alpha = 1 this is `EF` with a decay; with alpha < 1 a part of what was sent stays and is sent again.

    Args:
        decay: Share of the momentum that is kept at each step, 0 <= decay <= 1.
        alpha: Share of what was sent that is taken out, 0 <= alpha <= 1. At 0, the same entries are sent for ever.
        ema: Whether the momentum is an average of gradients, and not a decayed sum.

    Cost:
        4 bytes of memory per entry, in place of an optimizer's momentum; reads the gradient and the momentum, writes
        the momentum.

    State:
        `momentum_buffer`, this rank's own.

    Example:
        >>> momentum = DecoupledMomentum(decay=0.5)
        >>> state = {"momentum_buffer": torch.tensor([[2.0, 0.5]])}
        >>> momentum.compensate(torch.tensor([[1.0, 0.25]]), state)
        tensor([[2.0000, 0.5000]])
        >>> momentum.update(torch.tensor([[2.0, 0.5]]), torch.tensor([[2.0, 0.0]]), state)
        {'momentum_buffer': tensor([[0.0000, 0.5000]])}

    Reference:
        Peng, Quesnelle, Kingma. DeMo: Decoupled Momentum Optimization. 2024. arXiv:2411.19870, algorithm 1 (alpha = 1;
        gradients times the learning rate); the second version, of 2026, has alpha and `ema`.
    """

    decay: float = 0.999
    alpha: float = 1.0
    ema: bool = False

    state: ClassVar[tuple[StateTensor, ...]] = (StateTensor("momentum_buffer"),)
    requires: ClassVar[Requirement] = "any"
    needs_mean: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name, value in (("decay", self.decay), ("alpha", self.alpha)):
            if not 0 <= value <= 1:
                raise ValueError(f"DecoupledMomentum: expected 0 <= {name} <= 1, got {name}={value}.")
        if self.ema and self.decay == 1:
            raise ValueError("DecoupledMomentum: expected decay < 1 with ema=True, got decay=1.")

    @property
    def weight(self) -> float:
        """Weight w of the gradient."""
        return 1 - self.decay if self.ema else 1.0

    def growth(self, omega: float) -> float:
        """By how much an unbiased compressor multiplies the momentum's squared norm in a step, in the mean.

        E ||decay (p - alpha C(p))||^2 <= decay^2 ((1 - alpha)^2 + alpha^2 omega) ||p||^2.
        """
        return self.decay**2 * ((1 - self.alpha) ** 2 + self.alpha**2 * omega)

    def compensate(self, x: Tensor, state: State) -> Tensor:
        """The momentum of this step."""
        momentum = state["momentum_buffer"] * self.decay
        return momentum.add_(x, alpha=self.weight)

    def update(self, target: Tensor, sent: Tensor, state: State) -> dict[str, Tensor]:
        """The momentum without what was sent."""
        return {"momentum_buffer": target.sub_(sent, alpha=self.alpha)}

    def estimate(self, mean: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of what was sent."""
        return mean, {}
