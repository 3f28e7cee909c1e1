"""`MARINA`: unbiased compression of how the gradient changes, and now and then the gradient itself."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Self, final

from torch import Tensor

from gradwire.comm.feedback.base import ErrorFeedback, Requirement, State, StateTensor
from gradwire.comm.feedback.gains import check_positive, check_share
from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor

_NUMEL = 1 << 20


@final
@dataclass(frozen=True)
class MARINA(ErrorFeedback):
    """Add up compressed changes of the gradient, and begin anew from the dense mean with a small probability.

        with probability p, equal on all ranks:  H <- mean_i g_i, dense
        else:  sent_i = Q(g_i - g_i'),  g_i' the gradient of the step before;  H <- H + mean_i sent_i
        estimate = H

    For gradients of the whole local data: between small batches the change is mostly noise, which adds up until the
    next dense step.

    Args:
        probability: p, 0 < p <= 1. 1 / (1 + omega) by default, omega being the compressor's, which for a sparsifier
            makes dense and compressed traffic equal. The first step is dense.

    Cost:
        8 bytes of memory per entry; reads and writes the last gradient; reads and writes H. A share p of the steps
        sends 4 bytes per entry.

    State:
        `previous` (g_i'), this rank's own; `mean` (H), equal on all ranks.

    Example:
        >>> marina = MARINA(probability=0.25)
        >>> state = {"previous": torch.tensor([[1.0]]), "mean": torch.tensor([[2.0]])}
        >>> marina.compensate(torch.tensor([[1.5]]), state)
        tensor([[0.5000]])
        >>> sum(marina.sends_dense(step, seed=0) for step in range(1000))
        244

    Reference:
        Gorbunov, Burlachenko, Li, Richtarik. MARINA: Faster Non-Convex Distributed Learning with Compression. ICML
        2021. arXiv:2102.07845, algorithm 1.
    """

    probability: float | None = None

    state: ClassVar[tuple[StateTensor, ...]] = (StateTensor("previous"), StateTensor("mean", replicated=True))
    requires: ClassVar[Requirement] = "unbiased"

    def __post_init__(self) -> None:
        if self.probability is not None and not 0 < self.probability <= 1:
            raise ValueError(f"MARINA: expected 0 < probability <= 1, got probability={self.probability}.")

    def fit(self, compressor: Compressor) -> Self:
        """Choose the probability by the compressor's omega."""
        omega = compressor.omega(_NUMEL)
        return replace(self, probability=1 / (1 + omega)) if self.probability is None and omega is not None else self

    def sends_dense(self, step: int, seed: int) -> bool:
        """The first step, and others by a coin that all ranks throw alike."""
        assert self.probability is not None, "fit sets it"
        return step == 0 or counter_rng.fold("MARINA", seed, step) < self.probability * 2.0**62

    def restart(self, x: Tensor, mean: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Begin from here."""
        return {"previous": x}, {"mean": mean}

    def compensate(self, x: Tensor, state: State) -> Tensor:
        """Gradient minus that of the step before."""
        return x.sub(state["previous"])

    def update(self, target: Tensor, sent: Tensor, state: State) -> dict[str, Tensor]:
        """The gradient is the next step's previous one."""
        return {"previous": target.add_(state["previous"])}

    def estimate(self, mean: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Move the estimate by the mean of what was sent."""
        moved = mean + state["mean"]
        return moved, {"mean": moved}

    @staticmethod
    def max_stepsize(
        *, L: float, omega: float, workers: int, probability: float | None = None, L_mean: float | None = None
    ) -> float:
        """Largest step size for which descent is proven to converge.

            1 / (L + L_mean sqrt((1 - p) omega / (p n)))

        Args:
            L: Smoothness constant of the mean of all functions, > 0.
            omega: Of the compressor, its `omega(numel)`.
            workers: Their number n; 1 if all ranks draw alike (`RandomK`), for then errors do not average out.
            probability: p; 1 / (1 + omega) by default.
            L_mean: Quadratic mean of the workers' constants; L if they are all alike.

        Raises:
            ValueError: a value is out of range.

        Example:
            >>> MARINA.max_stepsize(L=1.0, omega=3.0, workers=1)
            0.25

        Reference:
            Gorbunov et al. 2021, theorem 2.1.
        """
        p = 1 / (1 + omega) if probability is None else probability
        check_positive(L=L, L_mean=L_mean, workers=workers)
        check_share("probability", p)
        gain = math.sqrt((1 - p) * omega / (p * workers))
        return 1 / (L + gain * (L if L_mean is None else L_mean))
