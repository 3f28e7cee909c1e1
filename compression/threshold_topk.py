"""`ThresholdTopK`: keep the entries above a threshold that lies within a few per cent of the k-th largest magnitude."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.compression.topk import RowTopK

_LONG_ROW = 1 << 14  # entries from which a row on the CPU pays for some thirty small operations of its own
_BLOCK_COLUMNS = 1 << 16  # columns whose maxima stay in the cache between two operations


def threshold_indices(x: Tensor, k: int, mantissa_bits: int) -> Tensor:
    """Indices of k entries in each row of `[rows, width]`: those above the k-th largest one's bin, then that bin's.

    Both groups are in the order of the row, so the result is the same on every device: int64 `[rows, k]`.
    """
    if x.device.type == "cpu":
        indices: Tensor = _on_cpu(x, k, mantissa_bits)
        return indices
    return _bisected(x, k, mantissa_bits)


def _bins(x: Tensor, mantissa_bits: int) -> Tensor:
    """The bin of every |x|: its exponent and the first bits of its mantissa, as one integer; NaN above infinity."""
    if x.dtype == torch.float64:
        return (x.view(torch.int64) & torch.iinfo(torch.int64).max).bitwise_right_shift_(52 - mantissa_bits).int()
    return (x.view(torch.int32) & torch.iinfo(torch.int32).max).bitwise_right_shift_(23 - mantissa_bits).short()


def _infinity(dtype: torch.dtype, mantissa_bits: int) -> int:
    """The bin of infinity."""
    return (2047 if dtype == torch.float64 else 255) << mantissa_bits


def _bisected(x: Tensor, k: int, mantissa_bits: int) -> Tensor:
    """Find the k-th largest bin of every row bit by bit, and the entries by their ranks: nothing waits for the host."""
    bins = _bins(x, mantissa_bits)
    kth = bins.new_zeros((bins.shape[0], 1))
    for bit in reversed(range(_infinity(x.dtype, mantissa_bits).bit_length())):
        higher = kth | 1 << bit
        kth = torch.where((bins >= higher).sum(1, keepdim=True) >= k, higher, kth)
    above = (bins > kth).cumsum(1, dtype=torch.int32)
    inside = (bins == kth).cumsum(1, dtype=torch.int32)
    rank = torch.arange(1, k + 1, dtype=torch.int32, device=bins.device).repeat(bins.shape[0], 1)
    rank_inside = rank - above[:, -1:]
    return torch.where(
        rank_inside <= 0, torch.searchsorted(above, rank), torch.searchsorted(inside, rank_inside.clamp_(min=1))
    )


@torch.library.custom_op("gradwire::threshold_indices", mutates_args=())  # opaque: sizes within depend on values
def _on_cpu(x: Tensor, k: int, mantissa_bits: int) -> Tensor:
    """Long rows one after the other, short ones all at once."""
    if x.shape[1] < _LONG_ROW or len(x) == 0:
        return _bisected(x, k, mantissa_bits)
    return torch.stack([_filtered(row, k, mantissa_bits) for row in x])


@_on_cpu.register_fake
def _(x: Tensor, k: int, mantissa_bits: int) -> Tensor:
    return x.new_empty((x.shape[0], k), dtype=torch.int64)


def _filtered(x: Tensor, k: int, mantissa_bits: int) -> Tensor:
    """What `_bisected` gives for one row `[width]`, reading it once and a part of it again.

    At least k entries are as large as the k-th largest maximum of strided groups of entries, and they lie in the
    groups whose maximum is: about k groups, and, unless large entries share groups, little more than k entries.
    """
    group = 1 << max(0, math.ceil(math.log2(len(x) / k) / 2))
    groups = len(x) // group
    grouped, rest = x[: group * groups].reshape(group, groups), x[group * groups :]
    maxima = torch.cat([torch.maximum(b.amax(0), -b.amin(0)) for b in torch.split(grouped, _BLOCK_COLUMNS, 1)] + [rest])
    bins_of_maxima = _bins(maxima, mantissa_bits)
    # The maximum of NaNs may be another NaN.
    least = min(_infinity(x.dtype, mantissa_bits), _kth_largest(bins_of_maxima, k))
    best_groups = (bins_of_maxima[:groups] >= least).nonzero().flatten()
    found, bins_found = [], []
    for i in range(group):
        bins = _bins(grouped[i].index_select(0, best_groups), mantissa_bits)
        hits = (bins >= least).nonzero().flatten()
        found.append(best_groups.index_select(0, hits).add_(i * groups))
        bins_found.append(bins.index_select(0, hits))
    hits = (bins_of_maxima[groups:] >= least).nonzero().flatten()
    indices = torch.cat([*found, hits + group * groups])
    bins = torch.cat([*bins_found, bins_of_maxima[groups:].index_select(0, hits)])
    kth = _kth_largest(bins, k)
    above = indices.masked_select(bins > kth)
    return torch.cat([above, indices.masked_select(bins == kth)[: k - len(above)]])


def _kth_largest(bins: Tensor, k: int) -> int:
    """The k-th largest of `bins`, from their histogram."""
    from_above = torch.bincount(bins).flip(0).cumsum(0)
    return len(from_above) - 1 - int(torch.searchsorted(from_above, k))


@final
@dataclass(frozen=True)
class ThresholdTopK(RowTopK):
    """Keep the share `ratio` of a tensor's entries that is largest, to the precision of a few bits of their magnitudes.

        C(x)_i = x_i if bin(|x_i|) > b, or bin(|x_i|) = b and i is among the first such; else 0
        b = the k-th largest of all bin(|x_i|),   k = max(1, ceil(ratio d))

    Here bin(a) is the exponent of a and the first `mantissa_bits` = m bits of its mantissa, so that all magnitudes of a
    bin lie within a factor of 1 + 2^-m. Entries that `TopK` keeps and this does not are replaced by some of the same
    bin. It takes `TopK`'s place where rows are long: payloads have the same layout and exactly k entries.

    On an accelerator b is found bit by bit in 8 + m counts over the row, and positions by prefix sums. On the CPU a
    row's strided groups give a bound that few entries reach, and those are counted.

    Args:
        ratio: Share of entries kept, 0 < ratio <= 1.
        mantissa_bits: m, 0..7: bins are a factor of 2 (0) to 1.008 (7) wide. Each bit costs an accelerator one pass.

    Shapes:
        x: any, cut into one row of d = numel entries. Payload: values `[1, k]` of x's dtype; indices `[1, bytes]` uint8
        of ceil(log2 d) bits each if d <= 65,536, else `[1, k]` int32.

    Cost:
        `k (itemsize + 4)` bytes, or less with packed indices. On the CPU one pass over the tensor and a second over
        about sqrt(ratio) of it; elsewhere 10 + m passes, most over 2 bytes an entry.

    State:
        None.

    Example:
        >>> coarse = ThresholdTopK(ratio=0.5, mantissa_bits=0)
        >>> coarse.decompress(coarse.compress(torch.tensor([1.0, -3.0, 1.5, 1.9])))
        tensor([ 1., -3.,  0.,  0.])

    Reference:
        Lin, Han, Mao, Wang, Dally. Deep Gradient Compression: Reducing the Communication Bandwidth for Distributed
        Training. ICLR 2018. arXiv:1712.01887, section 3 (threshold selection).

    Differences from the paper:
        The threshold is found from counts of bit patterns rather than from a sample, so that the number of entries is
        exact and the loss is bounded (`contraction`).
    """

    ratio: float = 0.01
    mantissa_bits: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ThresholdTopK: expected 0 < ratio <= 1, got ratio={self.ratio!r}.")
        if not isinstance(self.mantissa_bits, int) or not 0 <= self.mantissa_bits <= 7:
            raise ValueError(
                f"ThresholdTopK: expected an integer mantissa_bits in 0..7, got mantissa_bits={self.mantissa_bits!r}."
            )

    def row_width(self, shape: torch.Size) -> int:
        """The whole tensor is one row."""
        return max(1, shape.numel())

    def kept(self, width: int) -> int:
        """The share of the row, at least one entry."""
        return max(1, math.ceil(self.ratio * width))

    def _select(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        indices = threshold_indices(x, self.kept(x.shape[1]), self.mantissa_bits)
        return x.gather(1, indices).to(dtype), indices

    def contraction(self, numel: int) -> float:
        """Worst case: delta = k rho^2 / (k rho^2 + d - k) with rho = 1 / (1 + 2^-m).

        Let the k-th largest magnitude's bin be [rho t, t) or narrower. All that is kept is at least rho t and all that
        is dropped is below t, so ||C x||^2 >= k rho^2 t^2 and ||x - C x||^2 <= (d - k) t^2, and their ratio bounds the
        share that is kept. This is for normal numbers: below 2^-126 (float32) bins no longer shrink with their entries.
        """
        d = max(1, numel)
        k, rho = self.kept(d), 1 / (1 + 2.0**-self.mantissa_bits)
        return k * rho**2 / (k * rho**2 + d - k)

    def omega(self, numel: int) -> float | None:
        """Biased unless everything is kept."""
        return 0.0 if self.contraction(numel) == 1.0 else None
