"""`Exchange`: how the payloads of all ranks become their mean on every rank."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gradwire.comm.collectives import Collectives
from gradwire.comm.feedback.base import State, StateTensor
from gradwire.comm.row_matrix import RowMatrix
from gradwire.compression.base import Compressor, compute_dtype

Merge = Literal["mean", "contributors"]
"""Over whom an entry is averaged: all ranks, or those alone that sent something other than zero there."""


@dataclass
class Bundle:
    """What one matrix of a bucket brings to an exchange.

    Args:
        matrix: The layout of the rows that this rank holds.
        parts: This rank's compressed rows.
        keys: The random keys that compressed them; those of a second compression are derived from them.
        state: The exchange's own state for this matrix.
        dense: What sends these rows as they are, in place of the compressor, if the plan says so.
    """

    matrix: RowMatrix
    parts: tuple[Tensor, ...]
    keys: Tensor | None
    state: State
    dense: Compressor | None = None


@dataclass
class Outcome:
    """What an exchange returns.

    Args:
        means: One matrix per bundle: the mean over ranks of the decompressed payloads.
        bad: 0-d bool, equal on all ranks: whether any rank reported a non-finite gradient.
        states: New values of the exchange's state, one mapping per bundle.
    """

    means: list[Tensor]
    bad: Tensor
    states: list[dict[str, Tensor]] = field(default_factory=list)


class Exchange(ABC):
    """The collective part of averaging.

    A subclass moves payloads in as few collectives as it can, one buffer each, and decompresses in rank order, so that
    all ranks end with the same bits. The flag of a non-finite gradient travels in the same buffer.
    """

    workers: int = 1
    """Workers whose rows this process holds; more than one only in simulation."""

    ranks: Collectives
    """The group that takes part, once connected."""

    second: Compressor | None = None
    """The compressor of a second phase, if it differs from the first."""

    compresses_twice: bool = False
    """Whether the mean is compressed on its way back."""

    merge: Merge = "mean"
    """How what ranks sent becomes one."""

    consensus: bool = True
    """Whether all ranks end with the same mean."""

    scatters: bool = False
    """Whether every rank ends with the mean of its own tensors alone; tensors then have owners, dealt by the host."""

    feedback: bool = False
    """Whether the losses of a second compression are to be remembered."""

    weighs: bool = False
    """Whether it can weight what ranks sent."""

    weights: tuple[float, ...] | None = None
    """Weight of every worker in the mean, whose sum is their number; all 1 by default."""

    participation: float = 1.0
    """Share of the workers that sends something in a step."""

    def connect(self, ranks: Collectives, *, feedback: bool) -> None:
        """Take part in a group."""
        self.ranks = ranks
        self.feedback = feedback

    @property
    def shards(self) -> int:
        """Number of owners among whom rows are dealt."""
        return 1

    @property
    def state(self) -> tuple[StateTensor, ...]:
        """Matrices that the exchange keeps for the rows of `owned`."""
        return ()

    def held(self, matrix: RowMatrix) -> RowMatrix:
        """The rows that this rank compresses and keeps feedback state for."""
        return matrix

    def owned(self, held: RowMatrix) -> RowMatrix:
        """Of the rows held, those that the exchange's own state belongs to."""
        return held

    def averaged(self, held: RowMatrix) -> RowMatrix:
        """Of the rows held, those that `mean` gives this rank; feedback's replicated state belongs to them."""
        return held

    def kept(self, matrix: RowMatrix) -> RowMatrix:
        """The rows whose mean this rank ends with."""
        return matrix

    def owners(self, names: Sequence[str]) -> list[int] | None:
        """The rank that each of these tensors belongs to, if they have owners."""
        return None

    def planned_as(self, name: str, shape: torch.Size) -> tuple[str, torch.Size]:
        """The name and shape by which the plan decides on a tensor."""
        return name, shape

    @abstractmethod
    def check(self, compressor: Compressor) -> None:
        """Raise ValueError, with the remedy, if this compressor's payloads cannot go this way."""

    def enter(self, matrix: RowMatrix, x: Tensor) -> Tensor:
        """Average densely among close ranks before compression: `[rows, width]` to the rows this rank holds."""
        return x

    def dense_mean(self, held: RowMatrix, x: Tensor, bad: Tensor) -> tuple[Tensor, Tensor]:
        """Average the rows held, `x`, as they are; returns the rows of `averaged`, and the flag of all ranks."""
        flat = torch.cat([x.reshape(-1), bad.to(x.dtype).view(1)])
        self.ranks.all_reduce_(flat, uncompressed=x.numel())
        return (flat[:-1] / self.ranks.size).view(x.shape), flat[-1] != 0

    @abstractmethod
    def mean(self, compressor: Compressor, bundles: Sequence[Bundle], bad: Tensor) -> Outcome:
        """Average the payloads of all ranks; `bad` is 0-d bool, true if this rank's gradients are not finite."""

    def leave(self, matrices: Sequence[RowMatrix], estimates: list[Tensor], bad: Tensor) -> tuple[list[Tensor], Tensor]:
        """Spread estimates of the held rows to all rows of every close rank; the inverse of `enter`."""
        return estimates, bad


def decompress_mean(
    compressor: Compressor,
    parts: Sequence[Tensor],
    matrix: RowMatrix,
    keys: Tensor | None,
    merge: Merge = "mean",
    weights: Sequence[float] | None = None,
) -> Tensor:
    """Mean over ranks of `parts`, each `[n, rows, columns]`, added in rank order: `[rows, width]` of some of `matrix`.

    Sums are taken in the matrix's dtype even where payloads are narrower, so that they are those of what ranks keep.
    """
    size, width = parts[0].shape[0], matrix.width
    total = compressor.decompress_rows(tuple(part[0] for part in parts), width, keys).to(compute_dtype(matrix.dtype))
    if weights is not None:
        total *= weights[0]
        for rank, weight in enumerate(weights[1:], start=1):
            total.add_(compressor.decompress_rows(tuple(part[rank] for part in parts), width, keys), alpha=weight)
        return total.div_(size)
    counts = (total != 0).to(total.dtype) if merge == "contributors" and size > 1 else None
    for rank in range(1, size):
        compressor.add_rows_(total, tuple(part[rank] for part in parts), keys, counts=counts)
    if counts is not None:
        return total.div_(counts.clamp_(min=1))
    return total.div_(size) if size > 1 else total


def check_merge(name: str, merge: Merge) -> None:
    """Raise ValueError for an unknown rule."""
    if merge not in ("mean", "contributors"):
        raise ValueError(f"{name}: expected merge 'mean' or 'contributors', got merge={merge!r}.")
