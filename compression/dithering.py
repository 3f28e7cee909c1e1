"""`Dithering`: random rounding to levels between minus and plus a row's norm, which `QSGD` and its kin share."""

import math
from abc import abstractmethod
from typing import Literal

import torch
from torch import Tensor

from gradwire.compression import bits, counter_rng, trits
from gradwire.compression.base import Compressor, Part, Randomness
from gradwire.compression.checks import check_choice, check_positive, check_scale
from gradwire.compression.planes import pack_planes, unpack_planes
from gradwire.compression.rounding import binade, power_of_two, round_to_levels

Norm = Literal[1, 2, "inf"]
Spacing = Literal["linear", "natural"]

_MOST_LEVELS = {"linear": 32767, "natural": 127}  # codes of 16 bits; powers of two that float32 holds


class Dithering(Compressor):
    """Round each entry to one of the two levels around it, without bias; subclasses say which levels there are.

        C(x)_i = ||x||_p sign(x_i) l_i,  l_i in {0, l_1 < ... < l_s = 1} random with E l_i = |x_i| / ||x||_p

    Levels are evenly spaced (linear: l_j = j / s) or powers of two (natural: l_j = 2^(j - s)). A row sends its scale,
    and an entry the code s + sign(x_i) j: five to a byte if s = 1, else of ceil(log2(2 s + 1)) bits.
    """

    @property
    @abstractmethod
    def levels(self) -> int:
        """s, the levels of one sign beside zero."""

    @property
    @abstractmethod
    def norm(self) -> Norm:
        """The p of the norm."""

    @property
    @abstractmethod
    def spacing(self) -> Spacing:
        """Where levels stand."""

    @property
    @abstractmethod
    def bucket(self) -> int:
        """Entries that share a norm."""

    def __post_init__(self) -> None:
        who = type(self).__name__
        check_positive(who, "levels", self.levels)
        check_choice(who, "norm", self.norm, (1, 2, "inf"))
        check_choice(who, "spacing", self.spacing, ("linear", "natural"))
        check_positive(who, "bucket", self.bucket)
        if self.levels > _MOST_LEVELS[self.spacing]:
            raise ValueError(
                f"{who}: expected levels <= {_MOST_LEVELS[self.spacing]} with {self.spacing} spacing, "
                f"got levels={self.levels}."
            )

    @property
    def randomness(self) -> Randomness:
        """Each rank its own."""
        return "private"

    @property
    def carries_non_finite(self) -> bool:
        """The scale is a norm of all entries."""
        return True

    def row_width(self, shape: torch.Size) -> int:
        """One bucket."""
        return self.bucket

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Codes and their scale."""
        columns = trits.packed_columns(width) if self.levels == 1 else bits.packed_columns(width, self._code_bits)
        return Part("codes", torch.uint8, columns), Part("scale", torch.float32, 1)

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Scale, round, pack; a row is a bucket whatever its width."""
        signed, scale = self._round(x.float(), keys)
        return self._pack(signed), scale

    def compress_rows_with_sent(
        self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Undo the scaling before levels are packed."""
        signed, scale = self._round(x.float(), keys)
        return (self._pack(signed), scale), self._values(signed, scale)

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """Unpack, undo the scaling."""
        codes, scale = parts
        return self._values(self._unpack(codes, width).float() - self.levels, scale)

    def check_parts(self, parts: tuple[Tensor, ...], width: int) -> None:
        """Scales are finite and not negative, and no code stands above the last level."""
        codes, scale = parts
        check_scale(type(self).__name__, scale)
        last = trits.LARGEST if self.levels == 1 else 2 * self.levels
        found = codes if self.levels == 1 else self._unpack(codes, width)
        largest = int(found.max()) if found.numel() else 0
        if largest > last:
            raise ValueError(f"{type(self).__name__}: expected codes <= {last}, got {largest}.")

    def _round(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Numbers of levels, -s..s as float32 `[rows, width]`, and scales `[rows, 1]`."""
        if self.spacing == "linear":
            step = self._norms(x, self.levels)
            return round_to_levels(x, step, self.levels, keys), step
        assert keys is not None
        norm = self._norms(x)
        # In units of the first level: at most 2^(s - 1), and below 1 rounded to 0 or 1.
        y = x.abs() / torch.where(norm == 0, torch.inf, norm) * 2.0 ** (self.levels - 1)
        exponent, fraction = binade(y)
        fraction = torch.where(y < 1, y, fraction)
        number = (exponent - 126).clamp(min=0) + (counter_rng.uniform(keys, x.shape[1]) < fraction)
        return number.clamp(max=self.levels).float().copysign(x), norm

    def _norms(self, x: Tensor, divisor: int = 1) -> Tensor:
        """Norms of rows over `divisor`, `[rows, 1]`; sums are in float64, where they neither overflow nor vanish."""
        if self.norm == "inf":
            return x.abs().amax(dim=1, keepdim=True) / divisor
        norms: Tensor = torch.linalg.vector_norm(x, self.norm, dim=1, keepdim=True, dtype=torch.float64)
        return (norms / divisor).float()

    def _values(self, signed: Tensor, scale: Tensor) -> Tensor:
        """What numbers of levels stand for; a new tensor."""
        if self.spacing == "linear":
            return signed * scale
        level = power_of_two(signed.abs().int() + (127 - self.levels))
        return torch.where(signed == 0, 0.0, level).copysign(signed) * scale

    @property
    def _code_bits(self) -> int:
        """Bits of a code 0..2s."""
        return (2 * self.levels).bit_length()

    def _pack(self, signed: Tensor) -> Tensor:
        codes = signed + self.levels
        if self.levels == 1:
            return trits.pack_trits(codes)
        return pack_planes(codes, self._code_bits) if self._in_planes else bits.pack(codes, self._code_bits)

    def _unpack(self, packed: Tensor, width: int) -> Tensor:
        """Codes `[rows, width]`."""
        if self.levels == 1:
            return trits.unpack_trits(packed, width)
        if self._in_planes:
            return unpack_planes(packed, width, self._code_bits)
        return bits.unpack(packed, width, self._code_bits)

    @property
    def _in_planes(self) -> bool:
        """Whether codes fill a byte evenly."""
        return self._code_bits in (1, 2, 4, 8)

    def contraction(self, numel: int) -> float | None:
        """1 - omega, where that is positive; `Scaled` contracts always."""
        omega = self.omega(numel)
        return 1 - omega if omega is not None and omega < 1 else None

    def omega(self, numel: int) -> float | None:
        """A bound for d = min(bucket, numel) entries; with p <= 2 attained from v >= 2 (1 + c) on, and if s = 1.

        With the norm as the unit, let a be the first level, and c what bounds the variance of an entry y > a relative
        to y^2: 0 if levels are even (there a^2 / 4 bounds it absolutely), 1/8 if they double. An entry y <= a has
        variance a y - y^2. So all have at most c y^2 + h(y^2), where h(t) = a sqrt(t) - (1 + c) t up to its peak and
        constant from there: concave, growing, and h(t) / t falls. By Jensen the sum of variances over S = sum y^2 is at
        most c + h(t) / t at t = S / d.

        p <= 2: t is least where all entries are equal, t = d^(-2/p). With v = a d^(1/p) that gives v - 1 before the
        peak, which is at v = 2 (1 + c), and c + v^2 / (4 (1 + c)) behind it. With s = 1 no entry is above a, and it is
        v - 1 throughout.

        p = inf: one entry is 1 and exact. The others' largest ratio w is that of `BlockQuantize`,
        w (1 + w) = (d - 1) a^2 / 4, unless c is larger.
        """
        d = min(self.bucket, max(1, numel))
        if d == 1:
            return 0.0  # the entry is its own norm
        linear = self.spacing == "linear"
        first = 1 / self.levels if linear else math.ldexp(1, 1 - self.levels)
        above = 0.0 if linear or self.levels == 1 else 1 / 8
        if self.norm == "inf":
            return max(above, (math.sqrt(1 + (d - 1) * first**2) - 1) / 2)
        v = first * math.pow(d, 1 / self.norm)
        if self.levels == 1 or v >= 2 * (1 + above):
            return v - 1
        return above + v**2 / (4 * (1 + above))
