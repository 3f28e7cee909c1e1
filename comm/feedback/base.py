"""`ErrorFeedback`: what a rank remembers of what compression lost."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

Requirement = Literal["contraction", "unbiased", "any"]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class StateTensor:
    """One matrix of state, of the shape of the rows it belongs to.

    Args:
        name: Its key.
        replicated: Whether every rank holds the same values; otherwise they are this rank's own.
        dtype: Element type; the dtype of the arithmetic (float32, or float64 for float64 gradients) by default.
    """

    name: str
    replicated: bool = False
    dtype: torch.dtype | None = None


class ErrorFeedback(ABC):
    """A mechanism of error feedback: three element-wise maps on a matrix of rows, and the state they declare.

    The maps do not change the state. They return the new values, and the caller takes them over when the exchange
    has succeeded on all ranks, so a step that is skipped leaves no trace. `target` and `sent` are scratch that a map
    may overwrite.

        x --compensate--> target --compress, decompress--> sent --update--> new state
        mean over ranks of sent --estimate--> gradient estimate, new state

    The same object serves n simulated workers (rows of n workers in one matrix) and a federated client.
    """

    state: ClassVar[tuple[StateTensor, ...]] = ()
    """State tensors, created as zeros."""

    requires: ClassVar[Requirement] = "any"
    """What the mechanism needs of a compressor to converge."""

    needs_mean: ClassVar[bool] = True
    """Whether it is right only for the mean over all ranks of what they sent, in its size."""

    @abstractmethod
    def compensate(self, x: Tensor, state: State) -> Tensor:
        """What to compress now, for this rank's gradient rows `x`; a new tensor unless it is `x` itself."""

    @abstractmethod
    def update(self, target: Tensor, sent: Tensor, state: State) -> dict[str, Tensor]:
        """New values of this rank's own state, given that `target` was compressed and decompresses to `sent`."""

    @abstractmethod
    def estimate(self, mean: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient estimate from the mean of what all ranks sent, and new values of replicated state."""
