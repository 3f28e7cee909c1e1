"""`Compressor` and `Payload`: every compressor is a map on a matrix of rows.

A tensor of any shape is cut into rows of one width (`to_rows`), each row is compressed on its own, and the payload
keeps one entry per row in each of its parts. So a bucket of hundreds of tensors is one matrix and one kernel per step,
a parameter's result never depends on its neighbours, and a payload can be handed out in shards of rows.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.compression.tiles import Tile

Reduction = Literal["sum", "gather"]
Randomness = Literal["none", "shared", "private"]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic: float32, and float64 for float64 input."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Part:
    """One block of columns of a payload: what every row carries there.

    Args:
        name: What the block holds ("values", "indices", "scale", ...).
        dtype: Element type of the block.
        columns: Elements per row.
    """

    name: str
    dtype: torch.dtype
    columns: int

    @property
    def row_bytes(self) -> int:
        """Bytes per row."""
        return self.columns * self.dtype.itemsize


@dataclass(frozen=True, eq=False)
class Payload:
    """What travels in place of a tensor.

    Args:
        parts: One tensor `[rows, columns]` per `Part` of the compressor's layout.
        shape: Shape of the tensor that was compressed.
        dtype: Its dtype.
        keys: Random keys `[rows]` int64 of a shared-randomness compressor. Both ends derive them from the seed, so
            they do not travel between ranks.
    """

    parts: tuple[Tensor, ...]
    shape: torch.Size
    dtype: torch.dtype
    keys: Tensor | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.parts[0].shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that travel."""
        return sum(part.numel() * part.element_size() for part in self.parts)


class Compressor(ABC):
    """A lossy map on the rows of a matrix, and its inverse.

        tensor --to_rows--> rows --transform_rows--> x --compress_rows--> payload, and back

    A subclass is a frozen dataclass of hyper-parameters and implements the row form: `layout`, `compress_rows` and
    `decompress_rows`. The layout depends on the width and dtype only, never on values, so payloads of all ranks have
    equal sizes and nothing waits for the host.

    Contract: the input is unchanged; equal input and equal seed give an equal payload, and on CPU and CUDA payloads
    that decompress to equal values; 0-d, empty and non-contiguous tensors work; a row of zeros decompresses to zeros.
    """

    @property
    def randomness(self) -> Randomness:
        """Who draws alike: "none" draws; "shared": all ranks the same numbers; "private": each rank its own."""
        return "none"

    @property
    def carries_non_finite(self) -> bool:
        """Whether a row with an inf or NaN decompresses to one with an inf or NaN; if not, the sender must look."""
        return False

    @property
    def preserves_zero(self) -> bool:
        """Whether a zero entry decompresses to zero; if not, whoever adds rows clears the padding of the last one."""
        return True

    @property
    def changes_basis(self) -> bool:
        """Whether `transform_rows` does something; entries of a row are then no entries of the tensor."""
        return False

    @property
    def keeps_size(self) -> bool:
        """Whether what decompresses is as large as what went in. If not (signs alone), it stands for directions."""
        return True

    @property
    def rescales(self) -> bool:
        """Whether entries that are sent as they are arrive multiplied by another number than 1."""
        return False

    @property
    def reduction(self) -> Reduction:
        """What may be done with payloads: "sum": added before decompression (all-reduce); "gather": only gathered."""
        return "gather"

    # The row form: what a subclass implements.

    @abstractmethod
    def row_width(self, shape: torch.Size) -> int:
        """Width of the rows into which a tensor of this shape is cut, at least 1."""

    def tile(self, shape: torch.Size) -> Tile:
        """How a tensor of this shape is cut into rows of `row_width` entries: by default into runs of entries."""
        return Tile(self.row_width(shape))

    def transform_rows(self, x: Tensor, tile: Tile) -> Tensor:
        """Bring rows cut by `tile` into the orthonormal basis that `compress_rows` works in; a new tensor, or x."""
        return x

    def inverse_transform_rows(self, x: Tensor, tile: Tile) -> Tensor:
        """Bring rows back from the basis of `transform_rows`; a new tensor, or x."""
        return x

    @abstractmethod
    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """What each row carries, for rows of this width cut from tensors of this dtype."""

    @abstractmethod
    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compress each row.

        Args:
            x: `[rows, width]` in `compute_dtype(dtype)`.
            dtype: Dtype of the tensor that the rows were cut from, for parts that hold plain values.
            keys: `[rows]` int64 random keys; needed unless `randomness` is "none".

        Returns:
            One tensor `[rows, columns]` per part of `layout(width, dtype)`.
        """

    @abstractmethod
    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """Rebuild `[rows, width]` in float32 or float64: a new tensor, which the caller may overwrite."""

    def compress_rows_with_sent(
        self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Compress each row, and give what `decompress_rows` makes of it, to the bit, as a new tensor.

        Error feedback needs both. Override it where the second is at hand before packing. Without `keeps_size` the
        second holds, at the same places, the values that the payload stands for.
        """
        parts = self.compress_rows(x, dtype, keys)
        return parts, self.decompress_rows(parts, x.shape[1], keys)

    def add_rows_(
        self, total: Tensor, parts: tuple[Tensor, ...], keys: Tensor | None = None, *, counts: Tensor | None = None
    ) -> None:
        """Add what `decompress_rows` gives to `total [rows, width]` and one to `counts` where it is not zero, in place.

        Override it where payloads are sparse.
        """
        rows = self.decompress_rows(parts, total.shape[1], keys)
        total += rows
        if counts is not None:
            counts += rows != 0

    def check_parts(self, parts: tuple[Tensor, ...], width: int) -> None:  # noqa: B027  (most parts may hold any value)
        """Raise ValueError where parts of the right dtype and shape hold what `compress_rows` never gives.

        `wire.from_bytes` calls it on parts that come from outside; indices that point outside a row are the danger.
        """

    def contraction(self, numel: int) -> float | None:
        """Largest known delta in (0, 1] with E||x - C(x)||^2 <= (1 - delta)||x||^2 for every x of numel entries.

        None where no such bound holds or is known.
        """
        return None

    def omega(self, numel: int) -> float | None:
        """Smallest known omega >= 0 with E C(x) = x and E||C(x) - x||^2 <= omega ||x||^2; None if biased."""
        return None

    # Tensors of any shape.

    @final
    def compress(self, x: Tensor, *, seed: int = 0) -> Payload:
        """Compress a floating-point tensor of any shape; `seed` fixes every random draw.

        Raises:
            TypeError: `x` is not a real floating-point tensor.
        """
        if not x.is_floating_point():
            raise TypeError(f"{type(self).__name__}: expected a floating-point tensor, got {x.dtype}.")
        rows = self.transform_rows(self.to_rows(x), self.tile(x.shape))
        keys = None if self.randomness == "none" else counter_rng.row_keys(seed, rows.shape[0], x.device)
        parts = self.compress_rows(rows, x.dtype, keys)
        return Payload(parts, x.shape, x.dtype, keys if self.randomness == "shared" else None)

    @final
    def decompress(self, payload: Payload) -> Tensor:
        """Rebuild the tensor from its payload, in the shape and dtype that went in."""
        rows = self.decompress_rows(payload.parts, self.row_width(payload.shape), payload.keys)
        rows = self.inverse_transform_rows(rows, self.tile(payload.shape))
        return self.from_rows(rows, payload.shape).to(payload.dtype)

    @final
    def payload_bytes(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> int:
        """Bytes of the payload of a tensor of this shape and dtype: what really travels."""
        shape = torch.Size(shape)
        width = self.row_width(shape)
        return self.num_rows(shape) * sum(part.row_bytes for part in self.layout(width, dtype))

    @final
    def num_rows(self, shape: torch.Size) -> int:
        """Rows of a tensor of this shape."""
        return self.tile(shape).rows(shape)

    @final
    def to_rows(self, x: Tensor) -> Tensor:
        """Cut, pad with zeros to full rows and widen to `compute_dtype`: `[num_rows, row_width]`, a new tensor."""
        return self.tile(x.shape).cut(x.to(compute_dtype(x.dtype)))

    @final
    def from_rows(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `to_rows`: drop the padding and restore the shape."""
        return self.tile(shape).join(rows, shape)
