"""`Exchange`: how the payloads of all ranks become their mean on every rank."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from gradwire.comm.collectives import Collectives
from gradwire.comm.feedback.base import State, StateTensor
from gradwire.comm.row_matrix import RowMatrix
from gradwire.compression.base import Compressor

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
    """

    matrix: RowMatrix
    parts: tuple[Tensor, ...]
    keys: Tensor | None
    state: State


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

    merge: Merge = "mean"
    """How what ranks sent becomes one."""

    feedback: bool = False
    """Whether the losses of a second compression are to be remembered."""

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

    @abstractmethod
    def check(self, compressor: Compressor) -> None:
        """Raise ValueError, with the remedy, if this compressor's payloads cannot go this way."""

    def enter(self, matrix: RowMatrix, x: Tensor) -> Tensor:
        """Average densely among close ranks before compression: `[rows, width]` to the rows this rank holds."""
        return x

    @abstractmethod
    def mean(self, compressor: Compressor, bundles: Sequence[Bundle], bad: Tensor) -> Outcome:
        """Average the payloads of all ranks; `bad` is 0-d bool, true if this rank's gradients are not finite."""

    def leave(self, matrices: Sequence[RowMatrix], estimates: list[Tensor], bad: Tensor) -> tuple[list[Tensor], Tensor]:
        """Spread estimates of the held rows to all rows of every close rank; the inverse of `enter`."""
        return estimates, bad


def decompress_mean(
    compressor: Compressor, parts: Sequence[Tensor], width: int, keys: Tensor | None, merge: Merge = "mean"
) -> Tensor:
    """Mean over ranks of `parts`, each `[n, rows, columns]`, added in rank order: `[rows, width]`."""
    size = parts[0].shape[0]
    total = compressor.decompress_rows(tuple(part[0] for part in parts), width, keys)
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
