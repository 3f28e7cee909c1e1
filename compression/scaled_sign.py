"""`ScaledSign`: one bit per entry."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.compression.base import Compressor, Part
from gradwire.compression.bits import packed_columns
from gradwire.compression.checks import check_positive, check_scale
from gradwire.compression.planes import pack_planes, unpack_planes


@final
@dataclass(frozen=True)
class ScaledSign(Compressor):
    """Send the sign of every entry and the mean magnitude of its row.

        C(x)_i = s sign(x_i),  s = (1 / w) sum_j |x_j|,  j in the row of i;  sign(0) = 1

    A row of zeros stays zero, since its scale is zero. A zero beside other entries does not: one bit cannot say it.

    Args:
        width: Entries w that share a scale, >= 1. Multiples of 8 waste no bits.

    Shapes:
        x: any, cut into rows of `width`. Payload: signs `[rows, ceil(width / 8)]` uint8, scale `[rows, 1]` float32.

    Cost:
        1/8 + 4/width bytes per entry; one pass for the scale, one for the signs.

    State:
        None.

    Example:
        >>> scaled_sign = ScaledSign(width=2)
        >>> scaled_sign.decompress(scaled_sign.compress(torch.tensor([1.0, -3.0, 0.0, 0.0])))
        tensor([ 2., -2.,  0.,  0.])

    Reference:
        S. P. Karimireddy, Q. Rebjock, S. U. Stich, M. Jaggi, "Error Feedback Fixes SignSGD and other Gradient
        Compression Schemes", 2019, arXiv:1901.09847, algorithm 1.

    Differences from the paper:
        Rows instead of layers, and a zero counts as positive.
    """

    width: int = 1024

    def __post_init__(self) -> None:
        check_positive("ScaledSign", "width", self.width)

    @property
    def preserves_zero(self) -> bool:
        """One bit has no zero."""
        return False

    @property
    def carries_non_finite(self) -> bool:
        """The scale is the mean of all entries."""
        return True

    def row_width(self, shape: torch.Size) -> int:
        """Rows of `width` entries whatever the shape."""
        return self.width

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Signs and their scale."""
        return Part("signs", torch.uint8, packed_columns(width, 1)), Part("scale", torch.float32, 1)

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Take the mean of magnitudes, which unlike their root mean square contracts on sparse rows too."""
        return pack_planes(x >= 0, 1), x.abs().mean(dim=1, keepdim=True).float()

    def compress_rows_with_sent(
        self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Attach the signs to the scale before they are packed."""
        scale = x.abs().mean(dim=1, keepdim=True).float()
        positive = x >= 0
        return (pack_planes(positive, 1), scale), positive.to(scale.dtype).mul(2).sub(1).mul(scale)

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """Plus or minus the scale."""
        signs, scale = parts
        return (2.0 * unpack_planes(signs, width, 1) - 1.0) * scale

    def check_parts(self, parts: tuple[Tensor, ...], width: int) -> None:
        """Scales are finite and not negative."""
        check_scale("ScaledSign", parts[1])

    def contraction(self, numel: int) -> float:
        """Worst case, one entry that is not zero: delta = 1 / width.

        A row of d entries and w - d of padding has ||x - C(x)||^2 = ||x||^2 - (2 / w - d / w^2) ||x||_1^2, and
        ||x||_1 >= ||x||.
        """
        entries = min(self.width, max(1, numel))
        return (2 - entries / self.width) / self.width
