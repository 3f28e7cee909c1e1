"""`EControl`: EF21 and classic error feedback at once, with a gain that says how much of either."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

from torch import Tensor

from gradwire.comm.feedback.base import State, StateTensor
from gradwire.comm.feedback.gains import check_positive, check_share, remaining
from gradwire.comm.feedback.tracking import Tracking
from gradwire.compression.base import Compressor

_NUMEL = 1 << 20


@final
@dataclass(frozen=True)
class EControl(Tracking):
    """Track gradients by compressed differences, and feed back a share of all that the tracking has missed so far.

        sent_i = C(eta e_i + g_i - h_i);  e_i <- e_i + g_i - h_i - sent_i;  h_i <- h_i + sent_i
        H <- H + mean_i sent_i;  estimate = H

    e_i sums up what was not applied yet, so nothing is lost for good, as with `EF`; and h_i takes out what differs
    between workers, as with `EF21`. So it reaches the noise floor of plain SGD on data that differ between workers,
    with any batch size.

    Args:
        eta: The gain. delta / 2 by default, delta being the compressor's declared contraction, and at most 1/2; delta
            where noise rules. Small values average over about 1 / eta steps; beyond 2 delta it can diverge, and a
            warning says so. 0 is `EF21`.
        dense_start: Let h_i start at the first gradient, sent dense, in place of zero.

    Cost:
        12 bytes of memory per entry; reads the gradient, e and h, writes e and h; reads and writes H.

    State:
        `residual` (e_i) and `local` (h_i), this rank's own; `mean` (H), equal on all ranks.

    Example:
        >>> feedback = EControl(eta=0.5)
        >>> state = {"residual": torch.tensor([[1.0]]), "local": torch.tensor([[2.0]])}
        >>> feedback.compensate(torch.tensor([[4.0]]), state)
        tensor([[2.5000]])
        >>> feedback.update(torch.tensor([[2.5]]), torch.tensor([[2.5]]), state)
        {'residual': tensor([[0.5000]]), 'local': tensor([[4.5000]])}

    Reference:
        Gao, Islamov, Stich. EControl: Fast Distributed Optimization with Compression and Error Control. ICLR 2024.
        arXiv:2311.05645, algorithm 2.

    Differences from the paper:
        Theory there takes eta = delta / 400, which remembers too long to be of use; see the default.
    """

    eta: float | None = None
    dense_start: bool = False

    state: ClassVar[tuple[StateTensor, ...]] = (StateTensor("residual"), *Tracking.state)

    def __post_init__(self) -> None:
        if self.eta is not None and not 0 <= self.eta <= 1:
            raise ValueError(f"EControl: expected 0 <= eta <= 1, got eta={self.eta}.")

    def fit(self, compressor: Compressor) -> Self:
        """Choose eta by the compressor's contraction, or compare it with that."""
        delta = compressor.contraction(_NUMEL)
        if delta is None:
            return self
        if self.eta is None:
            return replace(self, eta=min(delta / 2, 0.5))
        if self.eta > 2 * delta:
            warnings.warn(
                f"EControl: expected eta <= {2 * delta:.3g}, twice the contraction of {compressor!r}, got "
                f"eta={self.eta}; larger ones can diverge.",
                stacklevel=4,
            )
        return self

    @property
    def _gain(self) -> float:
        assert self.eta is not None, "fit sets it"
        return self.eta

    def restart(self, x: Tensor, mean: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tracked values are the gradients, and nothing is left over."""
        return {"residual": x.new_zeros(()).expand_as(x), "local": x}, {"mean": mean}

    def compensate(self, x: Tensor, state: State) -> Tensor:
        """Gradient minus its tracked value, plus a share of the residual."""
        return x.sub(state["local"]).add_(state["residual"], alpha=self._gain)

    def update(self, target: Tensor, sent: Tensor, state: State) -> dict[str, Tensor]:
        """The residual e + g - h - sent = (1 - eta) e + target - sent, and the tracked value moved by what was sent."""
        residual = target.sub_(sent).add_(state["residual"], alpha=1 - self._gain)
        return {"residual": residual, "local": sent.add_(state["local"])}

    @staticmethod
    def max_stepsize(*, L: float, alpha: float, eta: float, L_mean: float | None = None) -> float:
        """Largest step size for which gradient descent, without noise, is proven to converge.

            1 / (L + kappa L_mean),  kappa = 2 q / (1 - q - 2 q eta),  q = sqrt(1 - alpha);  at eta = 0: q / (1 - q)

        Args:
            L: Smoothness constant of the mean of all functions, > 0.
            alpha: Contraction of the compressor, 0 < alpha <= 1.
            eta: The gain, below (1 - q) / (2 q), which is about alpha / 4: beyond it nothing is proven here, though
                twice the default is stable in practice.
            L_mean: Arithmetic mean of the workers' constants; L if they are all alike.

        Raises:
            ValueError: a value is out of range.

        Example:
            >>> round(EControl.max_stepsize(L=1.0, alpha=0.75, eta=0.25), 6)
            0.2

        Reference:
            `gains`, with the recursion of what a compression misses, s, and e:
            |u| <= (1 + eta) |s| + eta^2 |e| + |dg|, |s| <= q |u|, |e| <= (1 - eta) |e| + |s|, and g - h = s - eta e.
        """
        check_positive(L=L, L_mean=L_mean)
        check_share("alpha", alpha)
        q = remaining(alpha)
        limit = (1 - q) / (2 * q) if q > 0 else math.inf
        if not 0 <= eta <= 1 or eta >= limit:
            raise ValueError(f"max_stepsize: expected 0 <= eta < {min(1, limit):.4g} at alpha={alpha}, got eta={eta}.")
        kappa = 2 * q / (1 - q - 2 * q * eta) if eta > 0 else q / (1 - q)
        return 1 / (L + kappa * (L if L_mean is None else L_mean))
