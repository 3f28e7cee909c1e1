"""`RowState`: the state tensors of one row matrix, staged until the step has succeeded."""

from collections.abc import Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from gradwire.comm.feedback.base import StateTensor
from gradwire.comm.row_matrix import Piece, RowMatrix
from gradwire.compression.base import compute_dtype


@final
class RowState:
    """State of feedback for the rows that a rank holds, and of the exchange for the rows that it owns.

    Args:
        held: Rows that the feedback's state belongs to.
        feedback: The feedback's state tensors.
        owned: Rows that the exchange's state belongs to.
        exchange: The exchange's state tensors.
        averaged: Rows that the feedback's replicated state belongs to, those held by default.

    Attributes:
        feedback, exchange: Matrices by name, `[workers * rows, width]`, or `[rows, width]` if replicated.
    """

    def __init__(
        self,
        held: RowMatrix,
        feedback: Sequence[StateTensor],
        owned: RowMatrix,
        exchange: Sequence[StateTensor],
        *,
        averaged: RowMatrix | None = None,
    ) -> None:
        self._held, self._owned = held, owned
        mean = averaged if averaged is not None else held
        self._layouts = {tensor.name: mean if tensor.replicated else held for tensor in feedback}
        self.feedback = {tensor.name: _zeros(self._layouts[tensor.name], tensor) for tensor in feedback}
        self._next = {tensor.name: _zeros(held, tensor) for tensor in feedback if not tensor.replicated}
        self.exchange = {tensor.name: _zeros(owned, tensor) for tensor in exchange}
        self._begun = False
        self._staged: list[tuple[dict[str, Tensor], Mapping[str, Tensor]]] = []

    @property
    def nbytes(self) -> int:
        """Memory, coming values included."""
        held = [*self.feedback.values(), *self._next.values(), *self.exchange.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def layout(self, name: str) -> RowMatrix | None:
        """The rows that a tensor of the feedback's state belongs to, if there is one of this name."""
        return self._layouts.get(name)

    def begin(self) -> dict[str, Tensor]:
        """Where the coming values of the rank's own feedback state are to be written."""
        self._begun = True
        return self._next

    def clear_padding(self) -> None:
        """Set the padding of the coming values to zero, for compressors that leave something there."""
        for value in self._next.values():
            self._held.clear_padding_(value)

    def stage(self, new: Mapping[str, Tensor]) -> None:
        """New values of the feedback's replicated state."""
        self._staged.append((self.feedback, new))

    def stage_exchange(self, new: Mapping[str, Tensor]) -> None:
        """New values of the exchange's state."""
        self._staged.append((self.exchange, new))

    def commit(self, bad: Tensor) -> None:
        """Take the coming values over unless `bad`; on an accelerator without asking the host."""
        on_host = bad.device.type == "cpu"
        if self._begun and on_host and not bool(bad):
            for name, value in self._next.items():
                self.feedback[name], self._next[name] = value, self.feedback[name]
        elif self._begun and not on_host:
            for name, value in self._next.items():
                torch.where(bad, self.feedback[name], value, out=self.feedback[name])
        for current, new in self._staged:
            for name, value in new.items():
                value = value.to(current[name].dtype)
                if not on_host:
                    torch.where(bad, current[name], value, out=current[name])
                elif not bool(bad):
                    current[name] = value
        self._begun, self._staged = False, []

    def rows(self) -> dict[str, Tensor]:
        """Views `[workers, rows, width]` by key `state/parameter/first:last`."""
        return {f"{state}/{piece.name}/{piece.first}:{piece.last}": view for state, piece, view in self._pieces()}

    def fill(self, known: Mapping[str, Tensor]) -> None:
        """Copy values in from `rows` of other buckets or of a checkpoint, where they cover a piece."""
        spans: dict[str, list[tuple[int, int, Tensor]]] = {}
        for key, value in known.items():
            tensor, _, span = key.rpartition("/")
            start, stop = map(int, span.split(":"))
            spans.setdefault(tensor, []).append((start, stop, value))
        for state, piece, view in self._pieces():
            for first, last, value in spans.get(f"{state}/{piece.name}", []):
                if first <= piece.first and piece.last <= last:
                    view.copy_(value[:, piece.first - first : piece.last - first])

    def _pieces(self) -> Iterator[tuple[str, Piece, Tensor]]:
        for state, tensor in (self.feedback | self.exchange).items():
            matrix = self._layouts.get(state, self._owned)
            stacked = tensor.view(-1, matrix.rows, matrix.width) if matrix.rows else tensor[None]
            for piece in matrix.pieces:
                yield state, piece, stacked[:, piece.row : piece.row + piece.last - piece.first]


def _zeros(matrix: RowMatrix, tensor: StateTensor) -> Tensor:
    workers = 1 if tensor.replicated else matrix.workers
    dtype = tensor.dtype or compute_dtype(matrix.dtype)
    return torch.zeros((workers * matrix.rows, matrix.width), dtype=dtype, device=matrix.device)
