"""`TopK`: keep the largest entries of a tensor; and the row form that it shares with `ChunkTopK`."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.compression import bits
from gradwire.compression.base import Compressor, Part, compute_dtype

_BLOCK_ENTRIES = 1 << 21  # 8 MiB of float32: a block of rows is still in the cache when its candidates are gathered


def topk_indices(x: Tensor, k: int) -> Tensor:
    """Indices of the k entries of largest magnitude in each row of `[rows, width]`: int64 `[rows, k]`, in no order."""
    width = x.shape[1]
    group = 1 << math.ceil(math.log2(width / k) / 2)
    if x.device.type != "cpu" or group < 4 or width % group:
        return x.abs().topk(k, sorted=False).indices
    indices: Tensor = _grouped_topk(x, k, group)
    return indices


@torch.library.custom_op("gradwire::grouped_topk", mutates_args=())  # opaque: a compiler can only make it slower
def _grouped_topk(x: Tensor, k: int, group: int) -> Tensor:
    """`topk_indices` on the CPU, where `torch.topk` costs several nanoseconds an entry.

    The k largest entries lie in the k groups with the largest maxima, and maxima of strided groups are vector
    instructions. So `torch.topk` is asked for the k best of the width / group groups, and then for the k best of their
    group k entries. Exact up to ties; the work is least at group = sqrt(width / k).
    """
    groups = x.shape[1] // group
    first_of_row = torch.arange(0, x.shape[1], groups)[:, None]
    found = []
    for block in torch.split(x, max(1, _BLOCK_ENTRIES // x.shape[1])):
        grouped = block.reshape(-1, group, groups)
        maxima = torch.maximum(grouped.amax(1), -grouped.amin(1))  # two passes, but no temporary of the block's size
        best_groups = _order(maxima).topk(k, sorted=False).indices
        candidates = (best_groups[:, None, :] + first_of_row).flatten(1)
        best = _order(block.gather(1, candidates)).topk(k, sorted=False).indices
        found.append(candidates.gather(1, best))
    return torch.cat(found)


@_grouped_topk.register_fake
def _(x: Tensor, k: int, group: int) -> Tensor:
    return x.new_empty((x.shape[0], k), dtype=torch.int64)


def _order(x: Tensor) -> Tensor:
    """Integers in the order of |x|: its bits without the sign. They compare faster than floats, which may be NaN."""
    integer = torch.int64 if x.dtype == torch.float64 else torch.int32
    return x.view(integer) & torch.iinfo(integer).max


class RowTopK(Compressor):
    """Top-k of each row: values in the gradient's dtype and bit-packed positions. Subclasses say how rows are cut."""

    @abstractmethod
    def kept(self, width: int) -> int:
        """Entries kept in a row of this width, 1..width."""

    def layout(self, width: int, dtype: torch.dtype) -> tuple[Part, ...]:
        """Values and positions."""
        k = self.kept(width)
        return Part("values", dtype, k), index_part(k, width)

    @property
    def carries_non_finite(self) -> bool:
        """Inf and NaN are the largest, so they are kept."""
        return True

    def compress_rows(self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None) -> tuple[Tensor, ...]:
        """Select, gather and pack."""
        values, indices = self._select(x, dtype)
        return values, pack_indices(indices, x.shape[1])

    def compress_rows_with_sent(
        self, x: Tensor, dtype: torch.dtype, keys: Tensor | None = None
    ) -> tuple[tuple[Tensor, ...], Tensor]:
        """Scatter before positions are packed."""
        values, indices = self._select(x, dtype)
        sent = torch.zeros_like(x).scatter_(1, indices, values.to(x.dtype))
        return (values, pack_indices(indices, x.shape[1])), sent

    def _select(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        indices = topk_indices(x, self.kept(x.shape[1]))
        return x.gather(1, indices).to(dtype), indices

    def decompress_rows(self, parts: tuple[Tensor, ...], width: int, keys: Tensor | None = None) -> Tensor:
        """Scatter the values into rows of zeros."""
        values = parts[0]
        x = values.new_zeros((values.shape[0], width), dtype=compute_dtype(values.dtype))
        return x.scatter_(1, unpack_indices(parts[1], values.shape[1], width), values.to(x.dtype))

    def add_rows_(
        self, total: Tensor, parts: tuple[Tensor, ...], keys: Tensor | None = None, *, counts: Tensor | None = None
    ) -> None:
        """Add the values at their positions; those of a row are distinct, so the order does not matter."""
        values = parts[0].to(total.dtype)
        indices = unpack_indices(parts[1], values.shape[1], total.shape[1])
        total.scatter_add_(1, indices, values)
        if counts is not None:
            counts.scatter_add_(1, indices, (values != 0).to(counts.dtype))

    def check_parts(self, parts: tuple[Tensor, ...], width: int) -> None:
        """Every position lies in its row, and no two are the same."""
        check_indices(self, unpack_indices(parts[1], parts[0].shape[1], width), width)


def check_indices(compressor: Compressor, indices: Tensor, width: int) -> None:
    """Raise ValueError unless positions `[rows, k]` lie in [0, width) and are distinct within a row."""
    if ((indices < 0) | (indices >= width)).any():
        raise ValueError(f"{type(compressor).__name__}: expected indices in [0, {width}), got one outside.")
    in_order = indices.sort(dim=1).values
    if (in_order[:, 1:] == in_order[:, :-1]).any():
        raise ValueError(f"{type(compressor).__name__}: expected every index once in a row, got one twice.")


def index_part(k: int, width: int) -> Part:
    """The positions of k entries of a row: ceil(log2 width) bits each, or whole words for rows wider than 65,536."""
    index_bits = _index_bits(width)
    if index_bits > 16:
        return Part("indices", torch.int32 if index_bits <= 31 else torch.int64, k)
    return Part("indices", torch.uint8, bits.packed_columns(k, index_bits))


def pack_indices(indices: Tensor, width: int) -> Tensor:
    """Positions `[rows, k]` int64 in the form of `index_part`."""
    part = index_part(indices.shape[1], width)
    return bits.pack(indices, _index_bits(width)) if part.dtype == torch.uint8 else indices.to(part.dtype)


def unpack_indices(packed: Tensor, k: int, width: int) -> Tensor:
    """Inverse of `pack_indices`: int64 `[rows, k]`."""
    return bits.unpack(packed, k, _index_bits(width), torch.int64) if packed.dtype == torch.uint8 else packed.long()


def _index_bits(width: int) -> int:
    """Bits of a position in a row, at least 1."""
    return max(1, (width - 1).bit_length())


@final
@dataclass(frozen=True)
class TopK(RowTopK):
    """Keep the share `ratio` of a tensor's entries that is largest in magnitude.

        C(x)_i = x_i if |x_i| is among the k largest, else 0,   k = max(1, ceil(ratio d))

    The choice is global to the tensor, which on real gradients catches more energy than a choice per chunk but is
    slower and leaves one row to hand out; see `ChunkTopK`.

    Args:
        ratio: Share of entries kept, 0 < ratio <= 1.

    Shapes:
        x: any, cut into one row of d = numel entries. Payload: values `[1, k]` of x's dtype; indices `[1, bytes]` uint8
        of ceil(log2 d) bits each if d <= 65,536, else `[1, k]` int32.

    Cost:
        `k (itemsize + 4)` bytes, or less with packed indices; one selection over the whole tensor.

    State:
        None.

    Example:
        >>> topk = TopK(ratio=0.5)
        >>> topk.decompress(topk.compress(torch.tensor([1.0, -3.0, 0.5, 2.0])))
        tensor([ 0., -3.,  0.,  2.])

    Reference:
        D. Alistarh, T. Hoefler, M. Johansson, S. Khirirat, N. Konstantinov, C. Renggli, "The Convergence of Sparsified
        Gradient Methods", 2018, arXiv:1809.10505. S. Stich, J.-B. Cordonnier, M. Jaggi, "Sparsified SGD with Memory",
        2018, arXiv:1809.07599, Section 2.
    """

    ratio: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"TopK: expected 0 < ratio <= 1, got ratio={self.ratio!r}.")

    def row_width(self, shape: torch.Size) -> int:
        """The whole tensor is one row."""
        return max(1, shape.numel())

    def kept(self, width: int) -> int:
        """The share of the row, at least one entry."""
        return max(1, math.ceil(self.ratio * width))

    def contraction(self, numel: int) -> float:
        """Worst case, all magnitudes equal: delta = k / d."""
        width = max(1, numel)
        return self.kept(width) / width

    def omega(self, numel: int) -> float | None:
        """Biased unless everything is kept."""
        return 0.0 if self.contraction(numel) == 1.0 else None
