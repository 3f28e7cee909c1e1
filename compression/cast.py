"""`Cast`: send values in a narrower floating-point format."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor, Part, Randomness, Reduction
from gradwire.compression.checks import check_choice, check_scale
from gradwire.compression.rounding import round_to_format

_FORMATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
_WIDTH_16, _WIDTH_8 = 64, 256


@final
@dataclass(frozen=True)
class Cast(Compressor):
    """Round every value to 16 or 8 bits of floating point.

        16 bits:  C(x)_i = round(x_i)
         8 bits:  C(x)_i = s round(x_i / s),  s = max_j |x_j| / (largest number of the format), j in the row of i

    Rounding is to nearest, ties to even, or stochastic: up or down with expectation x_i.

    A 16-bit payload may be added before decompression, and the collective then rounds every partial sum to 16 bits.
    Error feedback does not see that rounding; gather the payloads where it matters (`AllGather`, `TwoPhase`).

    Args:
        dtype: "bfloat16", "float16", "float8_e4m3fn" or "float8_e5m2".
        stochastic: Round without bias, each rank with its own random numbers.

    Shapes:
        x: any. Payload of 16 bits: values `[rows, 64]`; of 8 bits: codes `[rows, 256]` uint8 and scale `[rows, 1]`
        float32.

    Cost:
        2 bytes per entry, or 1 + 1/64. One pass, after one for the row maximum with 8 bits.

    State:
        None.

    Example:
        >>> cast = Cast("bfloat16")
        >>> cast.decompress(cast.compress(torch.tensor([1.0, -3.003])))
        tensor([ 1., -3.])

    Reference:
        P. Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433, sections 3 and 4 (the formats,
        scaling); S. Gupta, A. Agrawal, K. Gopalakrishnan, P. Narayanan, "Deep Learning with Limited Numerical
        Precision", 2015, arXiv:1502.02551, section 3 (stochastic rounding).

    Differences from the paper:
        A scale for every 256 entries instead of one per tensor.
    """

    dtype: Literal["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"] = "bfloat16"
    stochastic: bool = False

    def __post_init__(self) -> None:
        check_choice("Cast", "dtype", self.dtype, _FORMATS)

    @property
    def randomness(self) -> Randomness:
        """Each rank its own, if rounding is stochastic."""
        return "private" if self.stochastic else "none"

    @property
    def reduction(self) -> Reduction:
        """16-bit values may be added; 8-bit values have their own scales."""
        return "gather" if self._scaled else "sum"

    @property
    def carries_non_finite(self) -> bool:
        """Every value travels, or makes its row's scale inf or NaN."""
        return True

    @property
    def _scaled(self) -> bool:
        return self._format.bits == 8

    @property
    def _format(self) -> torch.finfo:
        return torch.finfo(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def row_width(self, shape: torch.Size) -> int:
        """64 entries, or 256 that share a scale."""
        return _WIDTH_8 if self._scaled else _WIDTH_16

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Values, or codes and their scale."""
        if self._scaled:
            return Part("codes", torch.uint8, width), Part("scale", torch.float32, 1)
        return (Part("values", self._dtype, width),)

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Scale if the format is short of range, round, convert."""
        x = x.float()
        if not self._scaled:
            return (self._round(x, keys).to(self._dtype),)
        largest = self._format.max
        scale = x.abs().amax(dim=1, keepdim=True) / largest
        # The quotient passes the largest number by an ulp at times, and e4m3 turns what is too large into NaN.
        scaled = (x / torch.where(scale == 0, torch.inf, scale)).clamp(-largest, largest)
        return self._round(scaled, keys).to(self._dtype).view(torch.uint8), scale

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """Widen, and undo the scaling."""
        if not self._scaled:
            return parts[0].float()
        codes, scale = parts
        return codes.view(self._dtype).float() * scale

    def _round(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """Random rounding to the format's grid; conversion itself rounds to nearest."""
        if not self.stochastic:
            return x
        assert keys is not None
        return round_to_format(x, self._dtype, counter_rng.uniform(keys, x.shape[1]))

    def check_parts(self, parts: tuple[Tensor, ...], width: int) -> None:
        """8 bits: no code stands for NaN or infinity, and scales are finite and not negative."""
        if self._scaled:
            codes, scale = parts
            check_scale("Cast", scale)
            if not codes.view(self._dtype).float().isfinite().all():
                raise ValueError(f"Cast: expected finite codes, got NaN or infinity of {self.dtype}.")

    def contraction(self, numel: int) -> float | None:
        """1 - E||x - C(x)||^2 / ||x||^2 at its worst, for entries in the normal range of float32.

        To nearest, an entry is off by u = 2^-(m+1) of itself at most: delta = 1 - u^2. Stochastic: delta = 1 - omega.
        With 8 bits, entries below the format's normal range are off by half the smallest subnormal q, and the largest
        entry L of the row is exact; they add (d - 1) q^2 / (4 L^2), about 1e-9. None for float16, which rounds small
        entries to zero.
        """
        error = self._relative_error(numel)
        return None if error is None else 1 - error

    def omega(self, numel: int) -> float | None:
        """h^2 / (4 (1 + h)) with h = 2^-m if stochastic, and the term of subnormals as in `contraction`.

        An entry 1 + f h has variance f (1 - f) h^2, which is largest relative to its square at f = 1 / (2 + h).
        """
        return self._relative_error(numel) if self.stochastic else None

    def _relative_error(self, numel: int) -> float | None:
        h, largest, smallest = self._format.eps, self._format.max, self._format.smallest_normal * self._format.eps
        if self.dtype == "float16":
            return None
        normal = h**2 / (4 * (1 + h)) if self.stochastic else (h / 2) ** 2
        others = min(_WIDTH_8, max(1, numel)) - 1 if self._scaled else 0
        return normal + others * (smallest / (2 * largest)) ** 2
