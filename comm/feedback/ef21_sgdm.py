"""`EF21SGDM`: track a momentum in place of the gradient."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from gradwire.comm.feedback.base import State, StateTensor
from gradwire.comm.feedback.gains import check_positive, check_share, tracking_gain
from gradwire.comm.feedback.tracking import Tracking


@final
@dataclass(frozen=True)
class EF21SGDM(Tracking):
    """Average each rank's gradients over time, and track that average as `EF21` tracks the gradient.

        v_i <- (1 - eta) v_i + eta g_i;  sent_i = C(v_i - h_i);  h_i <- h_i + sent_i
        H <- H + mean_i sent_i;  estimate = H

    The average takes the noise of small batches out before it is tracked, so that the error falls with the learning
    rate at any batch size, as it does not for `EF21`. It is a momentum: with an optimizer that has one of its own, two
    act in turn.

    Args:
        eta: Weight of the new gradient, 0 < eta <= 1: one minus what torch calls momentum. 1 is `EF21`.
        dense_start: Let v_i and h_i start at the first gradient, sent dense, in place of zero.

    Cost:
        12 bytes of memory per entry; reads the gradient, v and h, writes v and h; reads and writes H.

    State:
        `exp_avg` (v_i) and `local` (h_i), this rank's own; `mean` (H), equal on all ranks.

    Example:
        >>> feedback = EF21SGDM(eta=0.5)
        >>> state = {"exp_avg": torch.tensor([[1.0]]), "local": torch.tensor([[0.5]])}
        >>> feedback.compensate(torch.tensor([[2.0]]), state)
        tensor([[1.]])

    Reference:
        Fatkhullin, Tyurin, Richtarik. Momentum Provably Improves Error Feedback! NeurIPS 2023. arXiv:2305.15155,
        algorithm 1 (EF21-SGDM).

    Differences from the paper:
        v_i and h_i start at zero, without bias correction, unless `dense_start`.
    """

    eta: float = 0.1
    dense_start: bool = False

    state: ClassVar[tuple[StateTensor, ...]] = (StateTensor("exp_avg"), *Tracking.state)

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 1:
            raise ValueError(f"EF21SGDM: expected 0 < eta <= 1, got eta={self.eta}.")

    def restart(self, x: Tensor, mean: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Average and tracked values are the gradients."""
        return {"exp_avg": x, "local": x}, {"mean": mean}

    def compensate(self, x: Tensor, state: State) -> Tensor:
        """The new average minus its tracked value."""
        return state["exp_avg"].lerp(x, self.eta).sub_(state["local"])

    def update(self, target: Tensor, sent: Tensor, state: State) -> dict[str, Tensor]:
        """The new average, and the tracked value moved by what was sent."""
        return {"exp_avg": target.add_(state["local"]), "local": sent.add_(state["local"])}

    @staticmethod
    def max_stepsize(*, L: float, alpha: float, eta: float, L_mean: float | None = None) -> float:
        """Largest step size for which gradient descent, without noise, is proven to converge: 1 / (L/eta + xi L_mean).

        With noise the error that is left falls with step size and eta.

        Args:
            L: Smoothness constant of the mean of all functions, > 0.
            alpha: Contraction of the compressor, 0 < alpha <= 1.
            eta: Weight of the new gradient.
            L_mean: Arithmetic mean of the workers' constants; L if they are all alike.

        Raises:
            ValueError: a value is out of range.

        Example:
            >>> EF21SGDM.max_stepsize(L=1.0, alpha=1.0, eta=0.1)
            0.1

        Reference:
            `gains`: v_i lags behind g_i with gain (1 - eta) / eta and moves no faster than it, so that h_i follows
            with gain xi. The paper's theorem 3 asks for min(alpha / (20 L_mean), eta / (7 L)), of the same order.
        """
        check_positive(L=L, L_mean=L_mean)
        check_share("eta", eta)
        return 1 / (L / eta + tracking_gain(alpha) * (L if L_mean is None else L_mean))
