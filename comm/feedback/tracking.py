"""`Tracking`: the maps of all mechanisms that follow each gradient by compressed differences."""

from typing import ClassVar

from torch import Tensor

from gradwire.comm.feedback.base import ErrorFeedback, Requirement, State, StateTensor


class Tracking(ErrorFeedback):
    """Keep h_i near each rank's gradient by what was sent, and their mean H on every rank.

        sent_i = C(target);  h_i <- h_i + sent_i;  H <- H + mean_i sent_i;  estimate = H

    Subclasses say what the target is and add their own state; their field `dense_start` lets h_i and H start at the
    first gradients and their dense mean in place of zero (unless that step is skipped for a non-finite one).
    """

    dense_start: bool

    state: ClassVar[tuple[StateTensor, ...]] = (StateTensor("local"), StateTensor("mean", replicated=True))
    requires: ClassVar[Requirement] = "contraction"

    def sends_dense(self, step: int, seed: int) -> bool:
        """The first step, if asked for."""
        return self.dense_start and step == 0

    def restart(self, x: Tensor, mean: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Tracked values are the gradients."""
        return {"local": x}, {"mean": mean}

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
