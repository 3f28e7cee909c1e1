"""`Chain`: compress the values of a payload again."""

from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor, Part, Randomness, Reduction
from gradwire.compression.tiles import Tile

_SECOND = counter_rng.fold("Chain.second")  # keeps the second's draws apart from the first's


@final
@dataclass(frozen=True)
class Chain(Compressor):
    """Send the values that `first` keeps through `second`: sparsify, then quantise.

        C(x) = C1 with its values v replaced by C2(v)

    Args:
        first: Sends entries of x, maybe scaled, in a part named "values" of the gradient's own dtype.
        second: Compresses each row of k values as one row of width k.

    Shapes:
        x: any, cut into rows as `first` does. Payload: the other parts of `first`, then the parts of `second`.

    Cost:
        The bytes of `first` without its values, plus those of `second`; the passes of `second` are over k values a row.

    State:
        None.

    Example:
        >>> from gradwire.compression import BlockQuantize, ChunkTopK
        >>> chain = Chain(ChunkTopK(k=2, chunk=4), BlockQuantize(bits=8))
        >>> chain.decompress(chain.compress(torch.tensor([1.0, 4.0, -3.0, 2.0])))
        tensor([ 0.0000,  4.0000, -2.9921,  0.0000])

    Reference:
        D. Basu, D. Data, C. Karakus, S. Diggavi, "Qsparse-local-SGD: Distributed SGD with Quantization, Sparsification,
        and Local Computations", 2019, arXiv:1906.02367, Section 2.

    Differences from the paper:
        Where both contract, the bound is the product of the two (`contraction`), with no rescaling.
    """

    first: Compressor
    second: Compressor

    def __post_init__(self) -> None:
        for name, member in (("first", self.first), ("second", self.second)):
            if not isinstance(member, Compressor):
                raise TypeError(f"Chain: expected {name} to be a Compressor, got {member!r}.")
        parts = self.first.layout(self.first.row_width(torch.Size([1])), torch.float64)
        if not any(part.name == "values" and part.dtype == torch.float64 for part in parts):
            raise ValueError(
                "Chain: expected a first that sends its values in the gradient's dtype, "
                f"got first={self.first!r}. Put the sparsifier first."
            )

    @property
    def randomness(self) -> Randomness:
        """Shared if either is, since both ends need those draws; then ranks round alike and their errors add up."""
        kinds = {self.first.randomness, self.second.randomness}
        return "shared" if "shared" in kinds else "private" if "private" in kinds else "none"

    @property
    def carries_non_finite(self) -> bool:
        """If both do."""
        return self.first.carries_non_finite and self.second.carries_non_finite

    @property
    def preserves_zero(self) -> bool:
        """If both do."""
        return self.first.preserves_zero and self.second.preserves_zero

    @property
    def reduction(self) -> Reduction:
        """Payloads add if those of both do and nothing but the second's parts travels."""
        alone = len(self.first.layout(self.first.row_width(torch.Size([1])), torch.float32)) == 1
        return "sum" if alone and self.first.reduction == self.second.reduction == "sum" else "gather"

    @property
    def changes_basis(self) -> bool:
        """If the first does."""
        return self.first.changes_basis

    @property
    def keeps_size(self) -> bool:
        """If both do."""
        return self.first.keeps_size and self.second.keeps_size

    def row_width(self, shape: torch.Size) -> int:
        """Rows of the first."""
        return self.first.row_width(shape)

    def tile(self, shape: torch.Size) -> Tile:
        """Tiles of the first."""
        return self.first.tile(shape)

    def transform_rows(self, x: Tensor, tile: Tile) -> Tensor:
        """The basis of the first."""
        return self.first.transform_rows(x, tile)

    def inverse_transform_rows(self, x: Tensor, tile: Tile) -> Tensor:
        """Back from the basis of the first."""
        return self.first.inverse_transform_rows(x, tile)

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """The first's parts but for its values, then the second's."""
        others, values = self._split(width, dtype)
        kept = tuple(replace(part, name=f"first.{part.name}") for part in others)
        return kept + self.second.layout(values.columns, dtype)

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Compress, then compress the values."""
        parts = list(self.first.compress_rows(x, dtype, keys))
        values = parts.pop(self._position(x.shape[1])).to(x.dtype)
        return tuple(parts) + self.second.compress_rows(values, dtype, _second_keys(keys))

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """Rebuild the values, then the rows."""
        return self.first.decompress_rows(self._first_parts(parts, width, keys), width, keys)

    def check_parts(self, parts: tuple[Tensor, ...], width: int) -> None:
        """What the second checks, then what the first does."""
        others, values = self._split(width, torch.float32)
        self.second.check_parts(parts[len(others) :], values.columns)
        keys = torch.zeros(parts[0].shape[0], dtype=torch.int64, device=parts[0].device)  # any: no check reads values
        self.first.check_parts(self._first_parts(parts, width, keys), width)

    def contraction(self, numel: int) -> float | None:
        """The product of the two.

        The first keeps entries as they are, so ||x - C1 x||^2 = ||x||^2 - ||C1 x||^2; the second's error lies on the
        kept entries, so it adds: E||x - C x||^2 <= ||x||^2 - d2 ||C1 x||^2 <= (1 - d1 d2) ||x||^2. None is known for a
        first that rescales them.
        """
        if self.first.rescales:
            return None
        k = self._values_per_row(numel)
        first, second = self.first.contraction(numel), None if k is None else self.second.contraction(k)
        return None if first is None or second is None else first * second

    def omega(self, numel: int) -> float | None:
        """Independent unbiased maps: 1 + omega = (1 + omega1)(1 + omega2)."""
        k = self._values_per_row(numel)
        first, second = self.first.omega(numel), None if k is None else self.second.omega(k)
        return None if first is None or second is None else (1 + first) * (1 + second) - 1

    def _values_per_row(self, numel: int) -> int | None:
        """Width of the rows that the second sees; None if its constants speak of narrower ones."""
        _, values = self._split(self.first.row_width(torch.Size([numel])), torch.float32)
        k = values.columns
        return k if k <= self.second.row_width(torch.Size([k])) else None

    def _first_parts(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None) -> tuple[Tensor, ...]:
        """The first's parts, with values as the second rebuilds them."""
        position = self._position(width)
        others, values = self._split(width, torch.float32)
        rebuilt = self.second.decompress_rows(parts[len(others) :], values.columns, _second_keys(keys))
        return (*parts[:position], rebuilt, *parts[position : len(others)])

    def _position(self, width: int) -> int:
        """Where "values" stand among the first's parts."""
        return [part.name for part in self.first.layout(width, torch.float32)].index("values")

    def _split(self, width: int, dtype: torch.dtype) -> tuple[tuple[Part, ...], Part]:
        """The first's other parts, and its values."""
        parts, position = self.first.layout(width, dtype), self._position(width)
        return parts[:position] + parts[position + 1 :], parts[position]


def _second_keys(keys: Tensor | None) -> Tensor | None:
    """Keys of the second, apart from those of the first."""
    return None if keys is None else counter_rng.at_step(keys, _SECOND)
