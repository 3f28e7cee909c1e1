"""`BlockQuantize`: round to evenly spaced levels, one scale per block."""

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from gradwire.compression.base import Compressor, Part, Randomness
from gradwire.compression.bits import packed_columns
from gradwire.compression.checks import check_choice, check_positive, check_scale
from gradwire.compression.planes import pack_planes, unpack_planes
from gradwire.compression.rounding import round_to_levels


@final
@dataclass(frozen=True)
class BlockQuantize(Compressor):
    """Round each entry to one of 2L + 1 evenly spaced levels between minus and plus the block's largest magnitude.

        C(x)_i = s round(x_i / s),  s = max_j |x_j| / L,  L = 2^(bits - 1) - 1,  j in the block of i

    Rounding is to nearest, ties to even, or stochastic: up or down with expectation x_i / s. Zero stays zero, and 2
    bits are the ternary -s, 0, s.

    Args:
        bits: Bits per entry: 8, 4 or 2.
        block: Entries that share a scale, >= 1.
        stochastic: Round without bias, each rank with its own random numbers.

    Shapes:
        x: any, cut into rows of `block`. Payload: codes `[rows, ceil(block bits / 8)]` uint8, a code being its level
        plus L; scale `[rows, 1]` float32.

    Cost:
        bits/8 + 4/block bytes per entry; one pass for the maximum, one for the codes.

    State:
        None.

    Example:
        >>> quantize = BlockQuantize(bits=4, block=2)
        >>> quantize.decompress(quantize.compress(torch.tensor([7.0, -3.2])))
        tensor([ 7., -3.])

    Reference:
        D. Alistarh, D. Grubic, J. Li, R. Tomioka, M. Vojnovic, "QSGD: Communication-Efficient SGD via Gradient
        Quantization and Encoding", 2016, arXiv:1610.02132, section 3 (stochastic levels), section 4 (buckets scaled by
        their maximum).

    Differences from the paper:
        Codes of one length instead of Elias codes, and rounding to nearest as the default, for use with error feedback.
    """

    bits: Literal[8, 4, 2] = 8
    block: int = 256
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_choice("BlockQuantize", "bits", self.bits, (8, 4, 2))
        check_positive("BlockQuantize", "block", self.block)

    @property
    def randomness(self) -> Randomness:
        """Each rank its own, if rounding is stochastic."""
        return "private" if self.stochastic else "none"

    @property
    def _levels(self) -> int:
        """L, the largest level."""
        return (1 << self.bits - 1) - 1

    @property
    def carries_non_finite(self) -> bool:
        """The scale is the largest magnitude over L."""
        return True

    def row_width(self, shape: torch.Size) -> int:
        """One block."""
        return self.block

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Codes and their scale."""
        return Part("codes", torch.uint8, packed_columns(width, self.bits)), Part("scale", torch.float32, 1)

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Scale, round, pack; a row is a block whatever its width."""
        levels, scale = self._round(x, keys)
        return pack_planes(levels + self._levels, self.bits), scale

    def compress_rows_with_sent(
        self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Undo the scaling before levels are packed."""
        levels, scale = self._round(x, keys)
        return (pack_planes(levels + self._levels, self.bits), scale), levels * scale

    def _round(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Levels -L..L `[rows, width]` and scales `[rows, 1]`, float32."""
        x = x.float()
        scale = x.abs().amax(dim=1, keepdim=True) / self._levels
        return round_to_levels(x, scale, self._levels, keys if self.stochastic else None), scale

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """Unpack, undo the scaling."""
        codes, scale = parts
        return (unpack_planes(codes, width, self.bits).float() - self._levels) * scale

    def check_parts(self, parts: tuple[Tensor, ...], width: int) -> None:
        """Scales are finite and not negative, and no code stands above the last level."""
        codes, scale = parts
        check_scale("BlockQuantize", scale)
        largest = unpack_planes(codes, width, self.bits).max().item() if codes.numel() else 0
        if largest > 2 * self._levels:
            raise ValueError(f"BlockQuantize: expected codes <= {2 * self._levels}, got {largest}.")

    def contraction(self, numel: int) -> float | None:
        """4 L^2 / (4 L^2 + d - 1) for d = min(block, numel); stochastic 1 - omega, where that is positive.

        In units of s the largest entry is L and exact. Another entry y adds at most y^2 to the error and at least y^2
        to ||x||^2; the worst is y = 1/2, just rounded to zero: (d - 1) / 4 over L^2 + (d - 1) / 4. Attained.
        """
        if self.stochastic:
            omega = self.omega(numel)
            return 1 - omega if omega is not None and omega < 1 else None
        squared = 4 * self._levels**2
        return squared / (squared + self._others(numel))

    def omega(self, numel: int) -> float | None:
        """(sqrt(1 + (d - 1) / L^2) - 1) / 2 for d = min(block, numel) if stochastic.

        In units of s an entry y <= 1 has variance y (1 - y). The largest ratio w of (d - 1) (y - y^2) over
        L^2 + (d - 1) y^2 stands at y = 1 / (2 (1 + w)), which gives w (1 + w) = (d - 1) / (4 L^2). Attained.
        """
        if not self.stochastic:
            return None
        return (math.sqrt(1 + self._others(numel) / self._levels**2) - 1) / 2

    def _others(self, numel: int) -> int:
        """Entries of a block beside its largest."""
        return min(self.block, max(1, numel)) - 1
