"""`RandomK`: keep random entries that every rank agrees on."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor, Part, Randomness, Reduction, compute_dtype
from gradwire.compression.checks import check_positive


@final
@dataclass(frozen=True)
class RandomK(Compressor):
    """Keep one random entry of each of the k equal strata of every chunk; all ranks draw the same.

        C(x)_i = s x_i if i = j chunk/k + u_j for a j in 0..k-1, else 0,   u_j uniform on 0..chunk/k - 1

    with s = chunk / k (unbiased) or s = 1 (contractive). Both ends derive the positions from the seed, so only values
    travel, and the values of all ranks may be added on the way.

    Args:
        k: Entries kept in a chunk, a divisor of `chunk`.
        chunk: Entries of a chunk, 2..65,536. A tensor's last chunk is padded with zeros.
        unbiased: Scale by chunk / k, so that E C(x) = x. With error feedback choose False.

    Shapes:
        x: any, cut into rows of `chunk` entries. Payload: values `[rows, k]` of x's dtype, not yet scaled.

    Cost:
        `k itemsize` bytes a chunk; one gather, one scatter.

    State:
        None.

    Example:
        >>> random_k = RandomK(k=2, chunk=4, unbiased=False)
        >>> payload = random_k.compress(torch.tensor([1.0, 2.0, 3.0, 4.0]), seed=1)
        >>> random_k.decompress(payload)
        tensor([0., 2., 3., 0.])

    Reference:
        S. Stich, J.-B. Cordonnier, M. Jaggi, "Sparsified SGD with Memory", 2018, arXiv:1809.07599, Section 2.

    Differences from the paper:
        Entries are drawn one from each stratum instead of any k of d. The marginal probabilities are the same k / d,
        and so are omega = d / k - 1 and delta = k / d, exactly; drawing needs no sort and no rejection.
    """

    k: int = 32
    chunk: int = 4096
    unbiased: bool = True

    def __post_init__(self) -> None:
        check_positive("RandomK", "k", self.k)
        check_positive("RandomK", "chunk", self.chunk)
        if not 2 <= self.chunk <= 65536:
            raise ValueError(f"RandomK: expected 2 <= chunk <= 65536, got chunk={self.chunk}.")
        if self.chunk % self.k:
            raise ValueError(f"RandomK: expected k to divide chunk, got k={self.k} and chunk={self.chunk}.")

    @property
    def randomness(self) -> Randomness:
        """All ranks draw the same positions."""
        return "shared"

    @property
    def reduction(self) -> Reduction:
        """Values at equal positions may be added before decompression."""
        return "sum"

    def row_width(self, shape: torch.Size) -> int:
        """Rows of `chunk` entries whatever the shape."""
        return self.chunk

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """The drawn values."""
        if width % self.k:
            raise ValueError(f"RandomK: expected rows of a multiple of k={self.k} entries, got width={width}.")
        return (Part("values", dtype, self.k),)

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Gather the drawn entries."""
        return (x.gather(1, self._indices(x.shape[1], keys)).to(dtype),)

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """Draw the positions again and scatter the scaled values."""
        (values,) = parts
        x = values.new_zeros((values.shape[0], width), dtype=compute_dtype(values.dtype))
        scale = width // self.k if self.unbiased else 1
        return x.scatter_(1, self._indices(width, keys), values.to(x.dtype) * scale)

    def _indices(self, width: int, keys: Tensor | None) -> Tensor:
        """One position in each stratum: int64 `[rows, k]`."""
        assert keys is not None
        strata = torch.arange(self.k, device=keys.device)
        draw = counter_rng.bits(keys[:, None], strata) >> 8  # 24 bits times a stratum of at most 2^16 stays exact
        stratum = width // self.k
        return strata * stratum + (draw * stratum >> 24)

    def contraction(self, numel: int) -> float | None:
        """In expectation delta = k / chunk; the scaled form moves too far to contract unless everything is kept."""
        return None if self.unbiased and self.k < self.chunk else self.k / self.chunk

    def omega(self, numel: int) -> float | None:
        """Exactly chunk / k - 1 if scaled; else biased unless everything is kept."""
        return self.chunk / self.k - 1 if self.unbiased or self.k == self.chunk else None
