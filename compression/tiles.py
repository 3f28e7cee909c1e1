"""`Tile`: how a tensor is cut into rows."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Tile:
    """Rows of `height * width` neighbours of a tensor, padded with zeros at its end.

    Args:
        width: Entries of one line of the tile, >= 1.
        height: Lines, >= 1.
        matrix: Whether lines follow one another down the matrix of the tensor's first dimension against the rest, so
            that a row is a block of that matrix. Otherwise they follow one another in memory, and a row is a run of
            entries.

    Example:
        >>> Tile(width=2, height=2, matrix=True).cut(torch.arange(8.0).view(2, 4))
        tensor([[0., 1., 4., 5.],
                [2., 3., 6., 7.]])
    """

    width: int
    height: int = 1
    matrix: bool = False

    @property
    def numel(self) -> int:
        """Entries of a row."""
        return self.height * self.width

    def rows(self, shape: torch.Size) -> int:
        """Rows of a tensor of this shape."""
        if not self.matrix:
            return -(-shape.numel() // self.numel)
        down, across = self._grid(shape)
        return down * across

    def fits(self, shape: torch.Size) -> bool:
        """Whether a tensor of this shape needs no padding."""
        return self.rows(shape) * self.numel == shape.numel()

    def cut(self, x: Tensor, workers: int = 1) -> Tensor:
        """Rows `[workers * rows, numel]` of a tensor, or of one per worker along a first dimension: a new tensor."""
        shape = x.shape if workers == 1 else x.shape[1:]
        out = x.new_zeros((workers * self.rows(shape), self.numel))
        if self.matrix:
            self.blocks(out, shape, workers).copy_(self.padded(x, workers))
        else:
            out.view(workers, -1)[:, : shape.numel()] = x.reshape(workers, -1)
        return out

    def join(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `cut` for one worker: drop the padding and restore the shape."""
        if not self.matrix:
            return rows.reshape(-1)[: shape.numel()].reshape(shape)
        lines, columns = as_matrix(shape)
        return self.blocks(rows, shape).flatten(3).flatten(1, 2)[0, :lines, :columns].reshape(shape)

    def blocks(self, rows: Tensor, shape: torch.Size, workers: int = 1) -> Tensor:
        """A view of the rows of a matrix as `[workers, down, height, across, width]`."""
        down, across = self._grid(shape)
        return rows.view(workers, down, across, self.height, self.width).transpose(2, 3)

    def padded(self, x: Tensor, workers: int = 1) -> Tensor:
        """The matrix of every worker in the form of `blocks`; a view if it needs no padding."""
        shape = x.shape if workers == 1 else x.shape[1:]
        lines, columns = as_matrix(shape)
        down, across = self._grid(shape)
        x = x.reshape(workers, lines, columns)
        missing = down * self.height - lines, across * self.width - columns
        if any(missing):
            x = torch.nn.functional.pad(x, (0, missing[1], 0, missing[0]))
        return x.view(workers, down, self.height, across, self.width)

    def _grid(self, shape: torch.Size) -> tuple[int, int]:
        """Tiles down and across."""
        lines, columns = as_matrix(shape)
        return -(-lines // self.height), -(-columns // self.width)


def as_matrix(shape: torch.Size) -> tuple[int, int]:
    """Lines and columns of a tensor's matrix: its first dimension against the rest."""
    lines = shape[0] if shape else 1
    return lines, shape[1:].numel()


def square_tile(shape: torch.Size, side: int) -> Tile:
    """The tile of at most `side` lines and columns that leaves least padding at the least number of tiles.

    A matrix is cut into blocks, a vector into runs of at most `side` lines; every dimension is dealt evenly (65 becomes
    two times 33, not 64 and 1 with 63 of padding).
    """
    if shape.numel() == 0:
        return Tile(1)
    if len(shape) >= 2:
        lines, columns = as_matrix(shape)
        return Tile(_even(columns, side), _even(lines, side), matrix=True)
    lines = -(-shape.numel() // side)
    rows = -(-lines // side)
    height = -(-lines // rows)
    return Tile(-(-shape.numel() // (rows * height)), height)


def _even(size: int, side: int) -> int:
    return -(-size // -(-size // side))
