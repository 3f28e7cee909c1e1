"""`NaturalCompression`: random rounding to powers of two."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor, Part, Randomness
from gradwire.compression.planes import pack_planes, unpack_planes
from gradwire.compression.rounding import binade, power_of_two

_WIDTH = 256
_TOP = 254  # exponent field of the largest finite numbers


@final
@dataclass(frozen=True)
class NaturalCompression(Compressor):
    """Round every entry up or down to a power of two, without bias, and send its sign and exponent.

        C(x)_i = sign(x_i) 2^k (1 + b_i),  2^k <= |x_i| < 2^(k+1),  P(b_i = 1) = |x_i| / 2^k - 1

    The mantissa of a float32 is that probability, so rounding is arithmetic on its bits. At the ends of the range:

    - zero stays zero; below 2^-126 an entry becomes 0 or 2^-126, still without bias, but no longer within `omega`;
    - from 2^127 on an entry becomes 2^127, which is biased, since 2^128 is no float32;
    - inf and NaN become inf, with a sign.

    Args:
        None.

    Shapes:
        x: any, cut into rows of 256. Payload: signs `[rows, 32]` and exponents `[rows, 256]`, uint8.

    Cost:
        9/8 bytes per entry; one pass.

    State:
        None.

    Example:
        >>> natural = NaturalCompression()
        >>> natural.decompress(natural.compress(torch.tensor([0.5, -4.0, 0.0])))
        tensor([ 0.5000, -4.0000,  0.0000])

    Reference:
        S. Horvath, C.-Y. Ho, L. Horvath, A. N. Sahu, M. Canini, P. Richtarik, "Natural Compression for Distributed Deep
        Learning", 2019, arXiv:1905.10988, definition of natural compression and theorem on omega = 1/8.

    Differences from the paper:
        float64 is rounded to float32 first, so that what lies outside of its range becomes 0 or inf.
    """

    @property
    def randomness(self) -> Randomness:
        """Each rank its own."""
        return "private"

    @property
    def carries_non_finite(self) -> bool:
        """The largest exponent stands for infinity."""
        return True

    def row_width(self, shape: torch.Size) -> int:
        """256 entries, which share nothing."""
        return _WIDTH

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Signs and exponents."""
        return Part("signs", torch.uint8, -(-width // 8)), Part("exponents", torch.uint8, width)

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Round exponents, pack signs."""
        return pack_planes(x < 0, 1), self._exponents(x.float(), keys).to(torch.uint8)

    def compress_rows_with_sent(
        self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Take the powers before signs are packed."""
        x = x.float()
        exponents = self._exponents(x, keys)
        parts = pack_planes(x < 0, 1), exponents.to(torch.uint8)
        return parts, power_of_two(exponents).copysign(x)

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """The powers, with their signs."""
        signs, exponents = parts
        negative = unpack_planes(signs, width, 1).bool()
        powers = power_of_two(exponents.int())
        return torch.where(negative, -powers, powers)

    def _exponents(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Rounded exponent fields, 0..255, as int32."""
        assert keys is not None
        exponent, fraction = binade(x.abs())
        up = (counter_rng.uniform(keys, x.shape[1]) < fraction) & (exponent < _TOP)
        return exponent + up

    def check_parts(self, parts: tuple[Tensor, ...], width: int) -> None:
        """No exponent stands for infinity."""
        if (parts[1] > _TOP).any():
            raise ValueError(f"NaturalCompression: expected exponents <= {_TOP}, got one of infinity.")

    def contraction(self, numel: int) -> float:
        """1 - omega; `Scaled` has 1 / (1 + omega) = 8/9."""
        return 1 - self.omega(numel)

    def omega(self, numel: int) -> float:
        """1/8 for entries from 2^-126 to 2^127.

        An entry 2^k (1 + f) has variance f (1 - f) 4^k; relative to its square that is largest at f = 1/3. Attained.
        """
        return 1 / 8
