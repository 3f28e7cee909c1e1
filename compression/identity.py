"""`Identity`: send values as they are."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.compression.base import Compressor, Part, Reduction, compute_dtype
from gradwire.compression.checks import check_positive


@final
@dataclass(frozen=True)
class Identity(Compressor):
    """Send every value unchanged, in the gradient's own dtype.

        C(x) = x

    With `AllReduce` this is plain data-parallel averaging; it is the baseline of every comparison.

    Args:
        width: Entries per row, >= 1. It matters only for how finely rows can be handed out as shards; a tensor's last
            row is padded to it.

    Shapes:
        x: any. Payload: values `[rows, width]` of x's dtype.

    Cost:
        `itemsize` bytes per entry; one copy.

    State:
        None.

    Example:
        >>> identity = Identity(width=4)
        >>> identity.decompress(identity.compress(torch.tensor([1.0, -3.0])))
        tensor([ 1., -3.])

    Reference:
        None; the lossless case.
    """

    width: int = 64

    def __post_init__(self) -> None:
        check_positive("Identity", "width", self.width)

    @property
    def reduction(self) -> Reduction:
        """Values may be added before decompression."""
        return "sum"

    @property
    def carries_non_finite(self) -> bool:
        """Every value travels."""
        return True

    def row_width(self, shape: torch.Size) -> int:
        """Rows of `width` entries whatever the shape."""
        return self.width

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """All values of the row."""
        return (Part("values", dtype, width),)

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Convert back to the gradient's dtype, which is exact for rows that came from it."""
        return (x.to(dtype, copy=True),)

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """Widen the values."""
        (values,) = parts
        return values.to(compute_dtype(values.dtype), copy=True)

    def contraction(self, numel: int) -> float:
        """Exact: delta = 1."""
        return 1.0

    def omega(self, numel: int) -> float:
        """Exact: omega = 0."""
        return 0.0
