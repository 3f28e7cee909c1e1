"""`RowMatrix`: how the tensors of one bucket lie in one matrix of rows.

Rows are ordered by owner, then by tensor. Exchanges that hand out rows as shards (two-phase, hierarchical) find every
owner's rows side by side; all others have one owner. Who owns a row follows from the tensor's name and shape alone,
never from the bucket, so state stays with its owner when hosts rebuild their buckets.
"""

import copy
import dataclasses
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.compression.base import compute_dtype
from gradwire.compression.tiles import Tile


@dataclass(frozen=True)
class Piece:
    """A run of rows of one tensor, and where it lies in the matrix.

    Args:
        name: The tensor's name.
        position: The tensor's position in the bucket.
        first: First row within the tensor.
        last: One past its last row within the tensor.
        row: First row within the matrix.
        entries: Entries of the tensor in this run, if rows are runs of entries; the rest of the last row is padding.
    """

    name: str
    position: int
    first: int
    last: int
    row: int
    entries: int


@final
class RowMatrix:
    """The layout of some tensors of one dtype as `[rows, width]`, in float32 or float64.

    Args:
        names: Names of the bucket's tensors.
        shapes: Their shapes, without a leading dimension of workers.
        members: Positions of the tensors that belong to this matrix.
        dtype: Their common dtype.
        tile: How they are cut into rows.
        shards: Number of owners among whom rows are dealt, >= 1.
        owners: The owner of every tensor of the bucket, with all its rows, if they are not dealt.
        workers: Workers whose gradients this process holds; tensors have that leading dimension if it is not 1.
        device: Where the matrix lives.
    """

    def __init__(
        self,
        names: Sequence[str],
        shapes: Sequence[torch.Size],
        members: Sequence[int],
        dtype: torch.dtype,
        tile: Tile,
        *,
        shards: int,
        owners: Sequence[int] | None = None,
        workers: int,
        device: torch.device,
    ) -> None:
        self.dtype, self.tile, self.workers, self.device = dtype, tile, workers, device
        self.width = width = tile.numel
        self._shapes = {position: shapes[position] for position in members}
        self.pieces: list[Piece] = []
        self.bounds = [0]
        for owner in range(shards):
            row = self.bounds[-1]
            for position in members:
                rows = tile.rows(shapes[position])
                if owners is not None:
                    first, last = 0, rows if owners[position] == owner else 0
                else:
                    turn = (owner - zlib.crc32(names[position].encode())) % shards
                    first, last = turn * rows // shards, (turn + 1) * rows // shards
                if first < last:
                    entries = min(last * width, shapes[position].numel()) - first * width
                    self.pieces.append(Piece(names[position], position, first, last, row, entries))
                row += last - first
            self.bounds.append(row)
        self.rows = self.bounds[-1]
        self._pieces_of: dict[int, list[Piece]] = {position: [] for position in members}  # in the tensor's order
        for piece in sorted(self.pieces, key=lambda piece: piece.first):
            self._pieces_of[piece.position].append(piece)
        self._runs, padding = self._split_sizes()
        self._places = self._tile_padding() if tile.matrix else torch.tensor(padding, dtype=torch.int64)  # on the host
        self.padding = self._places.to(device)
        self._parts: dict[tuple[int, int], RowMatrix] = {}
        keys = [
            counter_rng.row_keys(counter_rng.fold(p.name), p.last - p.first, device, first=p.first) for p in self.pieces
        ]
        self.keys = torch.cat(keys) if keys else torch.empty(0, dtype=torch.int64, device=device)

    def block(self, owner: int) -> slice:
        """The rows of one owner."""
        return slice(self.bounds[owner], self.bounds[owner + 1])

    def owners(self, first: int, last: int) -> "RowMatrix":
        """The layout of the rows of owners first, ..., last - 1 alone; `store` leaves others' tensors alone."""
        if (first, last) == (0, len(self.bounds) - 1):
            return self
        if (first, last) not in self._parts:
            start, stop = self.bounds[first], self.bounds[last]
            part = copy.copy(self)
            part.bounds = [bound - start for bound in self.bounds[first : last + 1]]
            part.rows = stop - start
            part.pieces = [
                dataclasses.replace(piece, row=piece.row - start) for piece in self.pieces if start <= piece.row < stop
            ]
            part.keys = self.keys[start:stop]
            inside = (self._places >= start * self.width) & (self._places < stop * self.width)
            part._places = self._places[inside] - start * self.width
            part.padding = part._places.to(self.device)
            part._parts = {}
            part._pieces_of = {
                position: [piece for piece in part.pieces if piece.position == position]
                for position, pieces in self._pieces_of.items()
                if pieces and all(start <= piece.row < stop for piece in pieces)
            }
            part._shapes = {position: self._shapes[position] for position in part._pieces_of}
            part._runs, _ = part._split_sizes()
            self._parts[first, last] = part
        return self._parts[first, last]

    def load(self, grads: Sequence[Tensor], factor: Tensor | float) -> Tensor:
        """Copy gradients times `factor` into a new matrix `[workers * rows, width]` with zero padding."""
        x = torch.empty((self.workers, self.rows * self.width), dtype=compute_dtype(self.dtype), device=self.device)
        if self.tile.matrix:
            self._load_tiles(x, grads)
        else:
            torch._foreach_copy_(self._views(x.index_fill_(1, self.padding, 0)), self._flat(grads))
        if not (isinstance(factor, float) and factor == 1.0):
            x *= factor
        return x.view(self.workers * self.rows, self.width)

    def store(self, mean: Tensor, grads: Sequence[Tensor], factor: Tensor | float) -> None:
        """Copy the mean `[rows, width]` times `factor` back into the gradients (of every worker)."""
        if not (isinstance(factor, float) and factor == 1.0):
            mean = mean * factor
        if self.tile.matrix:
            self._store_tiles(mean, grads)
            return
        if not self.pieces:  # an owner of nothing
            return
        views = self._views(mean.reshape(1, -1).expand(self.workers, -1))
        flat = self._flat(grads)
        torch._foreach_copy_(flat, views)
        for position in self._shapes:  # a gradient that is not contiguous was copied by _flat
            if not grads[position].is_contiguous():
                runs = [run for piece, run in zip(self.pieces, flat, strict=True) if piece.position == position]
                runs.sort(key=lambda run: run.storage_offset())
                grads[position].copy_(torch.cat(runs, dim=1).view(grads[position].shape))

    def store_each(self, rows: Tensor, grads: Sequence[Tensor]) -> None:
        """Copy every worker's rows `[workers, rows, width]` into its own slice of the gradients."""
        if self.workers == 1:
            self.store(rows[0], grads, 1.0)
            return
        everyone = [torch.empty_like(grad) for grad in grads]
        for worker, own in enumerate(rows):
            self.store(own, everyone, 1.0)
            for position in self._shapes:
                grads[position][worker] = everyone[position][worker]

    def _load_tiles(self, x: Tensor, grads: Sequence[Tensor]) -> None:
        into, out = [], []
        for position, shape in self._shapes.items():
            pieces = self._pieces_of[position]
            if len(pieces) == 1 and self.workers == 1:
                into.append(self.tile.blocks(self._run(x, pieces[0])[0], shape))
                out.append(self.tile.padded(grads[position]))
                continue
            tiles = self.tile.cut(grads[position], self.workers).view(self.workers, -1, self.width)
            into += [self._run(x, piece) for piece in pieces]
            out += [tiles[:, piece.first : piece.last] for piece in pieces]
        torch._foreach_copy_(into, out)

    def _store_tiles(self, mean: Tensor, grads: Sequence[Tensor]) -> None:
        for position, shape in self._shapes.items():
            grad = grads[position]
            runs = [self._run(mean.view(1, -1), piece)[0] for piece in self._pieces_of[position]]
            tiles = runs[0] if len(runs) == 1 else torch.cat(runs)
            if self.workers == 1 and grad.is_contiguous() and self.tile.fits(shape):
                self.tile.padded(grad).copy_(self.tile.blocks(tiles, shape))  # in one pass
            else:
                grad.copy_(self.tile.join(tiles, shape))

    def _run(self, x: Tensor, piece: Piece) -> Tensor:
        """The rows of a piece in `x [workers, rows * width]`: a view `[workers, rows of the piece, width]`."""
        first, last = piece.row * self.width, (piece.row + piece.last - piece.first) * self.width
        return x[:, first:last].view(x.shape[0], -1, self.width)

    def _tile_padding(self) -> Tensor:
        """Positions of the padding where rows are tiles."""
        there = torch.zeros((1, self.rows * self.width), dtype=torch.bool)
        for position, shape in self._shapes.items():
            if self.tile.fits(shape):
                tiles = torch.ones((), dtype=torch.bool).expand(self.tile.rows(shape), self.width)
            else:
                tiles = self.tile.cut(torch.ones(shape, dtype=torch.bool))
            for piece in self._pieces_of[position]:
                self._run(there, piece)[0].copy_(tiles[piece.first : piece.last])
        return torch.nonzero(~there[0]).flatten()

    def clear_padding_(self, x: Tensor) -> Tensor:
        """Set the padding of `x [workers * rows, width]` to zero, in place."""
        x.view(self.workers, -1).index_fill_(1, self.padding, 0)
        return x

    def _split_sizes(self) -> tuple[list[int], list[int]]:
        """Lengths of the alternating runs of entries and padding, and the positions of the padding."""
        runs: list[int] = []
        padding: list[int] = []
        for piece in self.pieces:
            start, size = piece.row * self.width, (piece.last - piece.first) * self.width
            runs += [piece.entries, size - piece.entries]
            padding += range(start + piece.entries, start + size)
        return runs, padding

    def _views(self, x: Tensor) -> list[Tensor]:
        return list(torch.split(x, self._runs, dim=1)[::2])

    def _flat(self, grads: Sequence[Tensor]) -> list[Tensor]:
        """The entries of every piece, `[workers, entries]`, views where the gradient is contiguous."""
        flat = {position: grads[position].reshape(self.workers, -1) for position in self._shapes}
        return [flat[piece.position].narrow(1, piece.first * self.width, piece.entries) for piece in self.pieces]
