"""`DCTTopK`: keep the largest DCT coefficients of every tile."""

import math
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from gradwire.compression import sign_codes
from gradwire.compression.base import Compressor, Part, compute_dtype
from gradwire.compression.block_quantize import BlockQuantize
from gradwire.compression.cast import Cast
from gradwire.compression.checks import check_choice, check_positive
from gradwire.compression.identity import Identity
from gradwire.compression.orthonormal import Transform, transform_rows
from gradwire.compression.tiles import Tile, square_tile
from gradwire.compression.topk import check_indices, index_part, pack_indices, topk_indices, unpack_indices


@final
@dataclass(frozen=True)
class DCTTopK(Compressor):
    """Keep the largest coefficients of every tile in the basis of the orthonormal discrete cosine transform.

        Z = D X D'^T for every tile X;  C(X) = D^T top_k(Z) D'

    Rows are coefficients, so error feedback keeps its state in this basis: one transform for a gradient and one for the
    mean, whatever the number of ranks.

    A matrix is cut into tiles of at most `chunk` lines and columns, dealt evenly; a tensor of more dimensions is the
    matrix of its first against the rest; a vector is cut into lines of at most `chunk`, and up to `chunk` of them make
    a tile that is transformed along the lines. What is missing to whole tiles is padded with zeros.

    Args:
        k: Coefficients kept of a tile of chunk x chunk, 1 <= k <= chunk^2; of a smaller tile the same share, rounded
            up. 32 unless `ratio` is given.
        ratio: Share of the coefficients kept, 0 < ratio <= 1, in place of k.
        chunk: Largest side of a tile, 2..128.
        transform: "dct"; "random", a fixed orthogonal matrix for each side; or "none", which keeps entries.
        values: "fp32" (fp64 for float64 tensors), "bf16", "int8" with a scale per tile, or "sign". Signs have no size:
            what decompresses is -1, 0 or 1 for each coefficient, and feedback subtracts the values they stand for.
            Zeros are sent as zeros.

    Shapes:
        x: any, cut into one row per tile of w entries, k' of which are kept. Payload: values `[rows, k']`, or codes
        `[rows, k']` uint8 and scale `[rows, 1]` float32 (int8); and indices `[rows, ceil(k' ceil(log2 w) / 8)]` uint8.
        Signs: codes `[rows, ceil(k' ceil(log2 2w) / 8)]` uint8.

    Cost:
        Bytes per coefficient, of tiles of 64 x 64: 5.5 (fp32), 3.5 (bf16), 2.5 + 4/k' (int8), 1.625 (sign); rows end at
        whole bytes. 4 chunk operations an entry for each transform, and a selection.

    State:
        None.

    Example:
        >>> dct_topk = DCTTopK(k=1, chunk=2)
        >>> dct_topk.decompress(dct_topk.compress(torch.tensor([[3.0, 3.0], [3.0, 3.5]])))
        tensor([[3.1250, 3.1250],
                [3.1250, 3.1250]])

    Reference:
        B. Peng, J. Quesnelle, D. P. Kingma, "DeMo: Decoupled Momentum Optimization", 2024, arXiv:2411.19870, section 3.

    Differences from the paper:
        Tiles are padded where the paper looks for divisors; positions and values are packed; a vector's k is that of a
        matrix, not chunk / 2. The random matrix is not drawn anew for each step, since state lives in its basis.
    """

    k: int | None = None
    ratio: float | None = None
    chunk: int = 64
    transform: Transform = "dct"
    values: Literal["fp32", "bf16", "int8", "sign"] = "bf16"

    def __post_init__(self) -> None:
        check_positive("DCTTopK", "chunk", self.chunk)
        if not 2 <= self.chunk <= 128:
            raise ValueError(f"DCTTopK: expected 2 <= chunk <= 128, got chunk={self.chunk}.")
        check_choice("DCTTopK", "transform", self.transform, ("dct", "random", "none"))
        check_choice("DCTTopK", "values", self.values, ("fp32", "bf16", "int8", "sign"))
        if self.k is not None:
            check_positive("DCTTopK", "k", self.k)
            if self.k > self.chunk**2:
                raise ValueError(f"DCTTopK: expected k <= chunk^2, got k={self.k} and chunk={self.chunk}.")
            if self.ratio is not None:
                raise ValueError(f"DCTTopK: expected k or ratio, got k={self.k} and ratio={self.ratio}.")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"DCTTopK: expected 0 < ratio <= 1, got ratio={self.ratio!r}.")

    def kept(self, width: int) -> int:
        """Coefficients kept of a tile of this many."""
        if self.ratio is not None:
            return max(1, math.ceil(self.ratio * width))
        k = min(32, self.chunk**2) if self.k is None else self.k
        return -(-k * width // self.chunk**2)

    @property
    def _values(self) -> Compressor:
        """What the kept coefficients of a row are sent through."""
        if self.values == "bf16":
            return Cast("bfloat16")
        return BlockQuantize(bits=8, block=self.chunk**2) if self.values == "int8" else Identity()

    @property
    def carries_non_finite(self) -> bool:
        """Inf and NaN are the largest, so they are kept; a sign does not show them."""
        return self.values != "sign"

    @property
    def preserves_zero(self) -> bool:
        """A coefficient spreads over its tile."""
        return self.transform == "none"

    @property
    def changes_basis(self) -> bool:
        """Unless there is no transform."""
        return self.transform != "none"

    @property
    def keeps_size(self) -> bool:
        """Signs do not."""
        return self.values != "sign"

    def tile(self, shape: torch.Size) -> Tile:
        """Square tiles, as far as the shape allows."""
        return square_tile(shape, self.chunk)

    def row_width(self, shape: torch.Size) -> int:
        """One tile."""
        return self.tile(shape).numel

    def transform_rows(self, x: Tensor, tile: Tile) -> Tensor:
        """Coefficients of every tile."""
        return transform_rows(x, tile, self.transform) if self.changes_basis else x

    def inverse_transform_rows(self, x: Tensor, tile: Tile) -> Tensor:
        """Tiles from their coefficients."""
        return transform_rows(x, tile, self.transform, inverse=True) if self.changes_basis else x

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Values and positions, or signs and positions in one."""
        k = self.kept(width)
        if self.values == "sign":
            return (sign_codes.code_part(k, width),)
        return (*self._values.layout(k, compute_dtype(dtype)), index_part(k, width))

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Select, gather and pack."""
        values, indices = self._select(x)
        if self.values == "sign":
            return (sign_codes.pack_codes(values, indices, x.shape[1]),)
        return (*self._values.compress_rows(values, compute_dtype(dtype)), pack_indices(indices, x.shape[1]))

    def compress_rows_with_sent(
        self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Scatter before positions are packed; with signs, the values that they stand for."""
        values, indices = self._select(x)
        parts: tuple[Tensor, ...]
        if self.values == "sign":
            parts = (sign_codes.pack_codes(values, indices, x.shape[1]),)
        else:
            sent_parts, values = self._values.compress_rows_with_sent(values, compute_dtype(dtype))
            parts = (*sent_parts, pack_indices(indices, x.shape[1]))
        return parts, torch.zeros_like(x).scatter_(1, indices, values.to(x.dtype))

    def _select(self, x: Tensor) -> tuple[Tensor, Tensor]:
        indices = topk_indices(x, self.kept(x.shape[1]))
        return x.gather(1, indices), indices

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """Scatter the values into rows of zeros."""
        if self.values == "sign":
            return sign_codes.signs(parts[0], self.kept(width), width)
        values = self._values.decompress_rows(parts[:-1], self.kept(width))
        x = values.new_zeros((values.shape[0], width))
        return x.scatter_(1, unpack_indices(parts[-1], self.kept(width), width), values)

    def add_rows_(
        self, total: Tensor, parts: tuple[Tensor, ...], keys: Tensor | None = None, *, counts: Tensor | None = None
    ) -> None:
        """Add the values at their positions, which are distinct; signs as whole rows."""
        if self.values == "sign":
            super().add_rows_(total, parts, keys, counts=counts)
            return
        width = total.shape[1]
        indices = unpack_indices(parts[-1], self.kept(width), width)
        values = self._values.decompress_rows(parts[:-1], self.kept(width)).to(total.dtype)
        total.scatter_add_(1, indices, values)
        if counts is not None:
            counts.scatter_add_(1, indices, (values != 0).to(counts.dtype))

    def check_parts(self, parts: tuple[Tensor, ...], width: int) -> None:
        """Positions lie in their tile, each once; codes stand for one; and what the values' format asks."""
        k = self.kept(width)
        if self.values == "sign":
            most = 2 * width - 1 if k > 1 else 2 * width
            if (sign_codes.unpack_codes(parts[0], k, width) > most).any():
                raise ValueError(f"DCTTopK: expected codes <= {most}, got one above.")
            return
        self._values.check_parts(parts[:-1], k)
        check_indices(self, unpack_indices(parts[-1], k, width), width)

    def contraction(self, numel: int) -> float | None:
        """Worst case, all magnitudes of a tile equal: delta = k / chunk^2 or ratio, times that of the values' format.

        The transform is an isometry. Signs have no size, so nothing is known of them.
        """
        if self.values == "sign":
            return None
        share = self.kept(self.chunk**2) / self.chunk**2 if self.ratio is None else self.ratio
        values = self._values.contraction(self.kept(self.chunk**2))
        return None if values is None else share * values
