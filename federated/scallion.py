"""`SCALLION`: SCAFFOLD with unbiased compression of what clients send."""

import warnings
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.compression.base import Compressor
from gradwire.federated.algorithm import LocalWork, Round, Vectors, Weighting
from gradwire.federated.control_variates import ControlVariates
from gradwire.federated.local_training import LocalTraining

_MANY = 1 << 20  # a compressor that is unbiased for so many entries is unbiased


@final
@dataclass(frozen=True)
class SCALLION(ControlVariates):
    """Control variates that move by a compressed share of what they are off.

        y <- y - lr (g - c_i + c), K times
        sent_i = C(alpha [(x - y_i) / (lr K) - c]);  c_i <- c_i + sent_i
        x <- x - lr_server lr K (mean_S sent_i + c);  c <- c + S/N mean_S sent_i

    c_i moves by what arrived, so both sides agree to the bit and the error of compression dies out with what is sent.
    With alpha = 1 and no compression it is `SCAFFOLD`. Beyond alpha = 1 / (1 + omega) it may diverge.

    Args:
        compressor: Unbiased, with a declared omega for all of the model's parameters: `QSGD`, `RandomK`, …. For others,
            `SCAFCOM`.
        alpha: 0 < alpha <= 1; min(0.1, 1 / (1 + omega)) by default.
        damped: Let mean_S sent_i count alpha times in the server's step, as above; otherwise it is divided by alpha
            there, as in DIANA, which moves faster and is noisier.
        weighting: p_i of means: "uniform", "samples", or a function of (client, num_examples).

    Shapes:
        Any model; the compressor sees one vector of all parameters.

    Cost:
        One compressed vector and a number up, two vectors down per client and round. One pass over the parameters in
        every local step.

    State:
        control: c_i at every client; c, their mean, at the server.

    Raises:
        ValueError: the compressor is biased or declares no omega, or alpha is out of range.

    Example:
        >>> from gradwire.compression import QSGD
        >>> round(SCALLION(QSGD(levels=1, bucket=256)).alpha_for(60_000), 4)
        0.0625

    Reference:
        Huang, Li, Li. Stochastic Controlled Averaging for Federated Learning with Communication Compression. ICLR 2024.
        arXiv:2308.08165.

    Differences from the paper:
        K is the participants' mean number of steps, where they are not all alike. The default of alpha, and weights
        p_i, of which the paper's are uniform.
    """

    compressor: Compressor
    alpha: float | None = None
    damped: bool = True
    weighting: Weighting = "uniform"

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, Compressor):
            raise TypeError(f"SCALLION: expected a Compressor, got {self.compressor!r}.")
        if self.compressor.omega(_MANY) is None:
            raise ValueError(
                f"SCALLION: expected an unbiased compressor that declares its omega, got {self.compressor!r}. "
                "Set unbiased=True or stochastic=True if it has that, or use SCAFCOM."
            )
        if self.alpha is not None and not 0 < self.alpha <= 1:
            raise ValueError(f"SCALLION: expected 0 < alpha <= 1, got alpha={self.alpha}.")

    def check(
        self,
        training: LocalTraining,
        *,
        clients: int,
        cohort_size: int,
        numel: int,
        server_lr: float | None = 1.0,
    ) -> None:
        """Plain SGD; warns if alpha is larger than what is stable."""
        super().check(training, clients=clients, cohort_size=cohort_size, numel=numel, server_lr=server_lr)
        stable = self._stable_alpha(numel)
        if self.alpha is not None and self.alpha > stable:
            warnings.warn(
                f"SCALLION: expected alpha <= 1 / (1 + omega) = {stable:.4g} with {self.compressor!r} for {numel} "
                f"parameters, got alpha={self.alpha}; it may diverge. Leave alpha out, or use a finer compressor.",
                stacklevel=3,
            )

    def alpha_for(self, numel: int) -> float:
        """What alpha is for a model of `numel` parameters."""
        return min(0.1, self._stable_alpha(numel)) if self.alpha is None else self.alpha

    def _stable_alpha(self, numel: int) -> float:
        omega = self.compressor.omega(numel)
        assert omega is not None
        return 1 / (1 + omega)

    @property
    def message_compressor(self) -> Compressor:
        """The compressor."""
        return self.compressor

    @property
    def messages(self) -> tuple[str, ...]:
        """The change of c_i."""
        return ("control_change",)

    @property
    def scalars(self) -> tuple[str, ...]:
        """K."""
        return ("steps",)

    def message(self, work: LocalWork) -> dict[str, Tensor]:
        """What c_i is off, times alpha."""
        off = work.pseudo_gradient.div_(work.lr * work.steps).sub_(work.received["control"])
        return {"control_change": off.mul_(self.alpha_for(off.shape[-1]))}

    def message_scalars(self, work: LocalWork) -> dict[str, float]:
        """K."""
        return {"steps": work.steps}

    def commit(self, work: LocalWork, arrived: Vectors) -> dict[str, Tensor]:
        """c_i, moved by what arrived."""
        return {"control": work.state["control"] + arrived["control_change"]}

    def server_step(self, mean: Vectors, state: dict[str, Tensor], round: Round) -> Tensor:
        """The step lr K (mean + c); moves c."""
        change, control = mean["control_change"], state["control"]
        gain = 1.0 if self.damped else 1 / self.alpha_for(change.shape[-1])
        step = torch.add(control, change, alpha=gain).mul_(round.lr * round.scalars["steps"])
        control.add_(change, alpha=round.share)
        return step
