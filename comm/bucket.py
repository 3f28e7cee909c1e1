"""`Bucket`: the tensors of one `average_` call, and what a communicator keeps for them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.comm.encoder import Encoder
from gradwire.comm.feedback.base import ErrorFeedback
from gradwire.comm.row_matrix import RowMatrix
from gradwire.comm.row_state import RowState
from gradwire.compression.base import Compressor


@final
@dataclass
class Section:
    """Tensors of a bucket that lie in one row matrix and go the same way.

    Args:
        matrix: How they lie.
        planned: Whether the plan sends them as they are, without feedback, where nothing is all-reduced.
        compressor: What is sent of each row.
        feedback: What is remembered of the rest.
        state: The state of feedback and exchange for these rows.
        encoder: Compensates, compresses, updates.
    """

    matrix: RowMatrix
    planned: bool
    compressor: Compressor
    feedback: ErrorFeedback
    state: RowState
    encoder: Encoder


@final
@dataclass
class Bucket:
    """The tensors of one `average_` call.

    Args:
        sections: Those that travel as rows; what the plan sends as it is comes last.
        dense: Positions of all others, which are all-reduced, by dtype.
    """

    sections: list[Section]
    dense: dict[torch.dtype, list[int]]

    def rows(self) -> dict[str, Tensor]:
        """Views of the state tensors."""
        return {key: value for section in self.sections for key, value in section.state.rows().items()}

    def fill(self, known: Mapping[str, Tensor]) -> None:
        """Copy values in from state tensors of the same parameters."""
        for section in self.sections:
            section.state.fill(known)

    def commit(self, bad: Tensor) -> None:
        """Take new values over unless `bad`."""
        for section in self.sections:
            section.state.commit(bad)


def unflatten(flat: Tensor, grads: Sequence[Tensor], members: Sequence[int]) -> None:
    """Copy the runs of `flat` into the gradients at these positions (of every worker)."""
    shapes = [grads[position].shape for position in members]
    workers = sum(shape.numel() for shape in shapes) // max(1, flat.numel())
    runs = torch.split(flat, [shape.numel() // workers for shape in shapes])
    for position, run in zip(members, runs, strict=True):
        grads[position].copy_(run.view(grads[position].shape[1:] if workers > 1 else grads[position].shape))
