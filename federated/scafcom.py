"""`SCAFCOM`: SCAFFOLD with any compression of what clients send."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from gradwire.comm.feedback import EF21SGDM
from gradwire.compression.base import Compressor
from gradwire.compression.scaled import Scaled
from gradwire.federated.algorithm import LocalWork, Round, Vectors, Weighting
from gradwire.federated.control_variates import ControlVariates

_MANY = 1 << 20  # a compressor that contracts so many entries contracts


@final
@dataclass(frozen=True)
class SCAFCOM(ControlVariates):
    """Control variates that follow a momentum of each client's gradient by compressed differences.

        y <- y - lr (g - c_i + c), K times;  g_i = (x - y_i) / (lr K) + c_i - c
        v_i <- (1 - beta) v_i + beta g_i;  sent_i = C(v_i - c_i);  c_i <- c_i + sent_i
        x <- x - lr_server lr K (mean_S sent_i + c);  c <- c + S/N mean_S sent_i

    What c_i lacks of v_i is the memory of what compression lost, so there is no other error feedback: on the client it
    is `comm.EF21SGDM`, of the mean gradient of local training. With an unbiased compressor that loses nothing it is
    `SCALLION(alpha=beta)`.

    Args:
        compressor: A contraction: `TopK`, `ScaledSign`, …. Others that are unbiased are shrunk by `Scaled`.
        beta: Weight of the new gradient in the momentum, 0 < beta <= 1.
        weighting: p_i of means: "uniform", "samples", or a function of (client, num_examples).

    Shapes:
        Any model; the compressor sees one vector of all parameters.

    Cost:
        One compressed vector and a number up, two vectors down per client and round. One pass over the parameters in
        every local step.

    State:
        exp_avg, control: v_i and c_i at every client; control: c, the mean of c_i, at the server.

    Raises:
        ValueError: the compressor is neither a contraction nor unbiased, or beta is out of range.

    Example:
        >>> from gradwire.compression import QSGD, TopK
        >>> SCAFCOM(TopK(ratio=0.01)).message_compressor
        TopK(ratio=0.01)
        >>> SCAFCOM(QSGD(levels=1, bucket=64)).message_compressor
        Scaled(compressor=QSGD(levels=1, bucket=64))

    Reference:
        Huang, Li, Li. Stochastic Controlled Averaging for Federated Learning with Communication Compression. ICLR 2024.
        arXiv:2308.08165.

    Differences from the paper:
        v_i and c_i start at zero. K is the participants' mean number of steps, where they are not all alike. Weights
        p_i, of which the paper's are uniform.
    """

    compressor: Compressor
    beta: float = 0.2
    weighting: Weighting = "uniform"

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, Compressor):
            raise TypeError(f"SCAFCOM: expected a Compressor, got {self.compressor!r}.")
        if self.compressor.contraction(_MANY) is None and self.compressor.omega(_MANY) is None:
            raise ValueError(
                f"SCAFCOM: expected a compressor that is a contraction or unbiased, got {self.compressor!r}."
            )
        if not 0 < self.beta <= 1:
            raise ValueError(f"SCAFCOM: expected 0 < beta <= 1, got beta={self.beta}.")

    @property
    def message_compressor(self) -> Compressor:
        """The compressor, shrunk if it is no contraction."""
        contracts = self.compressor.contraction(_MANY) is not None
        return self.compressor if contracts else Scaled(self.compressor)

    @property
    def client_state(self) -> tuple[str, ...]:
        """v_i and c_i."""
        return ("exp_avg", "control")

    @property
    def messages(self) -> tuple[str, ...]:
        """The change of c_i."""
        return ("control_change",)

    @property
    def scalars(self) -> tuple[str, ...]:
        """K."""
        return ("steps",)

    def message(self, work: LocalWork) -> dict[str, Tensor]:
        """What c_i lacks of the new v_i; leaves g_i in place of x - y_i."""
        gradient = work.pseudo_gradient.div_(work.lr * work.steps)
        gradient.add_(work.state["control"]).sub_(work.received["control"])
        return {"control_change": EF21SGDM(eta=self.beta).compensate(gradient, self._tracked(work))}

    def message_scalars(self, work: LocalWork) -> dict[str, float]:
        """K."""
        return {"steps": work.steps}

    def commit(self, work: LocalWork, arrived: Vectors) -> dict[str, Tensor]:
        """The new v_i, and c_i moved by what arrived."""
        feedback, tracked = EF21SGDM(eta=self.beta), self._tracked(work)
        target = feedback.compensate(work.pseudo_gradient, tracked)
        new = feedback.update(target, arrived["control_change"].clone(), tracked)
        return {"exp_avg": new["exp_avg"], "control": new["local"]}

    def server_step(self, mean: Vectors, state: dict[str, Tensor], round: Round) -> Tensor:
        """The step lr K (mean + c); moves c."""
        change, control = mean["control_change"], state["control"]
        step = (change + control).mul_(round.lr * round.scalars["steps"])
        control.add_(change, alpha=round.share)
        return step

    @staticmethod
    def _tracked(work: LocalWork) -> dict[str, Tensor]:
        return {"exp_avg": work.state["exp_avg"], "local": work.state["control"]}
