"""`Scaled`: an unbiased compressor, shrunk so that it contracts."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.compression.base import Compressor, Part, Randomness, Reduction
from gradwire.compression.tiles import Tile

_MANY = 1 << 20  # a compressor that is unbiased for so many entries is unbiased


@final
@dataclass(frozen=True)
class Scaled(Compressor):
    """Shrink what an unbiased compressor sends until it contracts, for feedback that needs a contraction.

        C(x) = Q(x) / (1 + w),  w the omega of Q for a row

    Q itself moves too far once its omega is 1 or more, and error feedback with it may diverge; Q / (1 + w) has
    E||x - C(x)||^2 <= (1 - 1 / (1 + w)) ||x||^2 for any w, and smaller factors only lose.

    Args:
        compressor: Q, with an `omega`.

    Shapes:
        Those of `compressor`: the factor does not travel.

    Cost:
        That of `compressor`, and one multiplication an entry.

    State:
        None.

    Example:
        >>> from gradwire.compression import TernGrad
        >>> scaled = Scaled(TernGrad(bucket=4))  # omega is 1/2
        >>> scaled.decompress(scaled.compress(torch.tensor([3.0, -3.0, 0.0, 3.0])))
        tensor([ 2., -2.,  0.,  2.])
        >>> TernGrad(bucket=64).contraction(64), Scaled(TernGrad(bucket=64)).contraction(64)
        (None, 0.2222222222222222)

    Reference:
        A. Beznosikov, S. Horvath, P. Richtarik, M. Safaryan, "On Biased Compression for Distributed Learning", 2020,
        arXiv:2002.12410 (scaled unbiased compressors).
    """

    compressor: Compressor

    def __post_init__(self) -> None:
        if not isinstance(self.compressor, Compressor):
            raise TypeError(f"Scaled: expected a Compressor, got {self.compressor!r}.")
        if self.compressor.omega(_MANY) is None:
            raise ValueError(
                f"Scaled: expected an unbiased compressor, got {self.compressor!r}. "
                "Use it as it is, or its unbiased form if it has one (stochastic=True, unbiased=True, clip=None)."
            )

    @property
    def randomness(self) -> Randomness:
        """That of the compressor."""
        return self.compressor.randomness

    @property
    def carries_non_finite(self) -> bool:
        """If the compressor does."""
        return self.compressor.carries_non_finite

    @property
    def preserves_zero(self) -> bool:
        """If the compressor does."""
        return self.compressor.preserves_zero

    @property
    def changes_basis(self) -> bool:
        """If the compressor does."""
        return self.compressor.changes_basis

    @property
    def keeps_size(self) -> bool:
        """If the compressor does."""
        return self.compressor.keeps_size

    @property
    def rescales(self) -> bool:
        """By the factor, and by what the compressor did before."""
        return True

    @property
    def reduction(self) -> Reduction:
        """That of the compressor: the factor is the same for all ranks."""
        return self.compressor.reduction

    def row_width(self, shape: torch.Size) -> int:
        """Rows of the compressor."""
        return self.compressor.row_width(shape)

    def tile(self, shape: torch.Size) -> Tile:
        """Tiles of the compressor."""
        return self.compressor.tile(shape)

    def transform_rows(self, x: Tensor, tile: Tile) -> Tensor:
        """The basis of the compressor."""
        return self.compressor.transform_rows(x, tile)

    def inverse_transform_rows(self, x: Tensor, tile: Tile) -> Tensor:
        """Back from the basis of the compressor."""
        return self.compressor.inverse_transform_rows(x, tile)

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """The parts of the compressor."""
        return self.compressor.layout(width, dtype)

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the compressor sends."""
        return self.compressor.compress_rows(x, dtype, keys)

    def compress_rows_with_sent(
        self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Shrink what the compressor sent."""
        parts, sent = self.compressor.compress_rows_with_sent(x, dtype, keys)
        return parts, sent.mul_(self._factor(x.shape[1]))

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """Rebuild, then shrink."""
        return self.compressor.decompress_rows(parts, width, keys).mul_(self._factor(width))

    def check_parts(self, parts: tuple[Tensor, ...], width: int) -> None:
        """What the compressor checks."""
        self.compressor.check_parts(parts, width)

    def contraction(self, numel: int) -> float:
        """2 c - c^2 (1 + omega) for c = 1 / (1 + w), from E||x - c Q||^2 = (1 - 2 c) ||x||^2 + c^2 E||Q||^2.

        That is 1 / (1 + w), and more for a tensor with fewer entries than a row, whose omega is smaller than w.
        """
        factor, omega = self._factor(self.row_width(torch.Size([numel]))), self.compressor.omega(numel)
        assert omega is not None
        return factor * (2 - factor * (1 + omega))

    def omega(self, numel: int) -> float | None:
        """Biased, unless nothing is lost anyway."""
        return 0.0 if self.contraction(numel) == 1 else None

    def _factor(self, width: int) -> float:
        """1 / (1 + w) for rows of this width."""
        omega = self.compressor.omega(width)
        assert omega is not None
        return 1 / (1 + omega)
