"""`ErrorFeedback`: what a rank remembers of what compression lost."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from gradwire.compression.base import Compressor

Requirement = Literal["contraction", "unbiased", "any"]
Absence = Literal["refused", "left out", "unchanged"]
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class StateTensor:
    """One matrix of state, of the shape of the rows it belongs to.

    Args:
        name: Its key.
        replicated: Whether every rank holds the same values, for the rows whose mean it is given (its own shard, if the
            exchange scatters); otherwise they are this rank's own, for all rows that it compresses.
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

    In a step that `sends_dense`, gradients are averaged as they are, and `restart` gives the state that follows.

    The same object serves n simulated workers (rows of n workers in one matrix) and a federated client.
    """

    state: ClassVar[tuple[StateTensor, ...]] = ()
    """State tensors, created as zeros."""

    @property
    def state_tensors(self) -> tuple[StateTensor, ...]:
        """`state`, with element types that were chosen."""
        return self.state

    requires: ClassVar[Requirement] = "any"
    """What the mechanism needs of a compressor to converge."""

    needs_mean: ClassVar[bool] = True
    """Whether it is right only for the mean over all ranks of what they sent, in its size."""

    absence: ClassVar[Absence] = "refused"
    """Where only some workers take part in a step, what the others count as: nothing sent, averaging over those that
    take part ("left out"), or no change since they last did ("unchanged")."""

    weights: tuple[float, ...] | None = None
    """Weight n w_i of every worker in the mean, whose sum is n; all 1 by default. Gradients are divided by it first."""

    def fit(self, compressor: Compressor) -> Self:
        """The same, with what was left open set from the compressor's constants."""
        return self

    def sends_dense(self, step: int, seed: int) -> bool:
        """Whether this step, counted from 0, sends gradients as they are; equal on all ranks, decided on the host."""
        return False

    def restart(self, x: Tensor, mean: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """State after a dense step, this rank's own and replicated, from the gradients and their (weighted) mean."""
        raise AssertionError(f"{type(self).__name__} sends no dense step")

    @abstractmethod
    def compensate(self, x: Tensor, state: State) -> Tensor:
        """What to compress now, for this rank's gradient rows `x`; a new tensor unless it is `x` itself."""

    @abstractmethod
    def update(self, target: Tensor, sent: Tensor, state: State) -> dict[str, Tensor]:
        """New values of this rank's own state, given that `target` was compressed and decompresses to `sent`."""

    @abstractmethod
    def estimate(self, mean: Tensor, state: State) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient estimate from the mean of what all ranks sent, and new values of replicated state."""
