"""`FedNova`: normalised averaging of clients that take different numbers of steps."""

from dataclasses import dataclass
from typing import final

from torch import Tensor

from gradwire.federated.algorithm import Algorithm, Correction, LocalWork, Round, Vectors, Weighting
from gradwire.federated.local_training import LocalTraining


@final
@dataclass(frozen=True)
class FedNova(Algorithm):
    """Divide what each client did by how many steps it amounts to, so that those who do more do not count for more.

        d_i = (x - y_i) / (lr ||a_i||);  x <- x - lr_server lr tau sum_i p_i d_i / sum_i p_i

    a_i holds the weights that a client's raw gradients have in its movement, so ||a_i||, their sum, is K for plain SGD;
    [K - rho (1 - rho^K) / (1 - rho)] / (1 - rho) for momentum rho, which is taken from `LocalTraining`; and
    (1 - (1 - lr mu)^K) / (lr mu) for the proximal term. tau is the mean of ||a_i||, or of K with a proximal term. Where
    all K are alike, this is FedAvg, or FedProx but for a factor.

    Momentum of the server is the server's optimizer.

    Args:
        mu: Of a proximal term mu/2 ||y - x||^2 in local losses, >= 0; not beside momentum.
        weighting: p_i: "samples", "uniform", or a function of (client, num_examples).

    Shapes:
        Any model.

    Cost:
        That of FedAvg, and one number per client and round.

    State:
        None.

    Example:
        >>> FedNova.effective_steps(10, momentum=0.9)
        41.381059609

    Reference:
        Wang, Liu, Liang, Joshi, Poor. Tackling the Objective Inconsistency Problem in Heterogeneous Federated
        Optimization. NeurIPS 2020. arXiv:2007.07481, section 4.

    Differences from the paper:
        tau as in the authors' code; the paper leaves it open. Their code also takes momentum and the proximal term
        together, with a ||a_i|| that is not the one of that method; here this is refused. Weight decay counts as a part
        of the loss.
    """

    mu: float = 0.0
    weighting: Weighting = "samples"

    def __post_init__(self) -> None:
        if not self.mu >= 0:
            raise ValueError(f"FedNova: expected mu >= 0, got mu={self.mu}.")

    @staticmethod
    def effective_steps(steps: int, *, momentum: float = 0.0, decay: float = 0.0) -> float:
        """||a||_1: the sum of weights that the gradients of local steps have in what they add up to.

        Args:
            steps: K, >= 0.
            momentum: 0 <= momentum < 1.
            decay: lr mu, of a proximal term, >= 0; not beside momentum.

        Raises:
            ValueError: both are given.
        """
        if momentum and decay:
            raise ValueError(
                f"FedNova: expected momentum or a proximal term, got momentum={momentum}, lr mu={decay}. "
                "Leave one of them out."
            )
        if momentum:
            return (steps - momentum * (1 - momentum**steps) / (1 - momentum)) / (1 - momentum)
        return (1 - (1 - decay) ** steps) / decay if decay else float(steps)

    def check(
        self,
        training: LocalTraining,
        *,
        clients: int,
        cohort_size: int,
        numel: int,
        server_lr: float | None = 1.0,
    ) -> None:
        """SGD alone, with momentum or a proximal term."""
        if training.optimizer is not None:
            raise ValueError(
                f"FedNova: expected local training by SGD, got {training}. Of other optimizers it is not known what "
                "their steps amount to."
            )
        if training.momentum and self.mu:
            raise ValueError(
                f"FedNova: expected momentum or a proximal term, got momentum={training.momentum}, mu={self.mu}. "
                "Leave one of them out."
            )

    @property
    def scalars(self) -> tuple[str, ...]:
        """What tau is the mean of."""
        return ("steps",)

    def correction(self, start: Tensor, received: Vectors, state: Vectors) -> Correction:
        """The gradient of the proximal term."""
        return Correction(proximal=self.mu)

    def message(self, work: LocalWork) -> dict[str, Tensor]:
        """d_i."""
        return {"pseudo_gradient": work.pseudo_gradient.div_(work.lr * self._norm(work))}

    def message_scalars(self, work: LocalWork) -> dict[str, float]:
        """||a_i||, or K with a proximal term."""
        return {"steps": work.steps if self.mu else self._norm(work)}

    def server_step(self, mean: Vectors, state: dict[str, Tensor], round: Round) -> Tensor:
        """The mean of d_i, times lr tau."""
        return mean["pseudo_gradient"].mul_(round.lr * round.scalars["steps"])

    def _norm(self, work: LocalWork) -> float:
        return self.effective_steps(work.steps, momentum=work.momentum, decay=work.lr * self.mu)
