"""`EF21`: compress the change of the gradient."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from gradwire.comm.feedback.base import ErrorFeedback, Requirement, State, StateTensor


@final
@dataclass(frozen=True)
class EF21(ErrorFeedback):
    """Track each rank's gradient by compressed differences, and step along the mean of the tracked gradients.

        sent_i = C(g_i - h_i);  h_i <- h_i + sent_i;  H <- H + mean_i sent_i;  estimate = H

    Every rank keeps H, the mean of all h_i, so it needs no dense message. Made for full or large-batch gradients:
    with small batches its error does not fall with the learning rate, because h_i follows the noise; use `EF` there.

    Cost:
        8 bytes of memory per entry; reads the gradient and h, writes h; reads and writes H.

    State:
        `local` (h_i), this rank's own; `mean` (H), equal on all ranks. Both start at zero.

    Example:
        >>> ef21 = EF21()
        >>> state = {"local": torch.tensor([[1.0]]), "mean": torch.tensor([[2.0]])}
        >>> ef21.compensate(torch.tensor([[1.5]]), state)
        tensor([[0.5000]])
        >>> ef21.estimate(torch.tensor([[0.25]]), state)[0]
        tensor([[2.2500]])

    Reference:
        Richtarik, Sokolov, Fatkhullin. EF21: A New, Simpler, Theoretically Better, and Practically Faster Error
        Feedback. NeurIPS 2021. arXiv:2106.05203, algorithm 2.

    Differences from the paper:
        h_i starts at zero (one of the paper's choices) rather than at a dense first gradient; put `Warmup` in front
        for a dense start.
    """

    state: ClassVar[tuple[StateTensor, ...]] = (StateTensor("local"), StateTensor("mean", replicated=True))
    requires: ClassVar[Requirement] = "contraction"

    def compensate(self, x: Tensor, state: State) -> Tensor:
        """Gradient minus its tracked value."""
        return x.sub(state["local"])

    def update(self, target: Tensor, sent: Tensor, state: State) -> dict[str, Tensor]:
        """Move the tracked value by what was sent."""
        return {"local": sent.add_(state["local"])}

    def estimate(self, mean: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """Move the mean of the tracked values by the mean of what was sent."""
        moved = mean + state["mean"]
        return moved, {"mean": moved}
