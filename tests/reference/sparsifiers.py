"""Float64 NumPy references of the sparsifying compressors and of the counter-based random numbers they draw from."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Keys = NDArray[np.int64]


def identity(x: Array) -> Array:
    """All entries."""
    return x.copy()


def top_k(x: Array, k: int | None = None, ratio: float | None = None) -> Array:
    """Zero all but the k largest magnitudes of each row; k = max(1, ceil(ratio d)) if a ratio is given."""
    k = max(1, int(np.ceil(ratio * x.shape[1]))) if ratio is not None else k
    kept = np.zeros_like(x)
    for row, out in zip(x, kept, strict=True):
        largest = sorted(range(len(row)), key=lambda i: -abs(row[i]))[:k]
        out[largest] = row[largest]
    return kept


def threshold_top_k(x: Array, ratio: float, mantissa_bits: int) -> Array:
    """Keep the first k entries of each row in the order of falling bins, whose lower edges are 2^e (1 + j 2^-m)."""
    mantissa, exponent = np.frexp(np.abs(x))
    bins = np.where(x == 0, -np.inf, exponent + np.floor((2 * mantissa - 1) * 2**mantissa_bits) / 2**mantissa_bits)
    kept = np.zeros_like(x)
    for row, row_bins, out in zip(x, bins, kept, strict=True):
        first = np.argsort(-row_bins, kind="stable")[: max(1, int(np.ceil(ratio * len(row))))]
        out[first] = row[first]
    return kept


def top_k_of_tile(x: Array, k: int, chunk: int) -> Array:
    """Of rows narrower than chunk^2, keep the same share, rounded up."""
    return top_k(x, k=int(np.ceil(k * x.shape[1] / chunk**2)))


def top_k_signs(x: Array, k: int, chunk: int) -> Array:
    """The signs of what is kept."""
    return np.sign(top_k_of_tile(x, k, chunk))


def random_bits(keys: Keys, counters: NDArray[np.integer]) -> NDArray[np.uint32]:
    """32 random bits for each key and counter, in wrapping 32-bit arithmetic."""

    def mix(word: NDArray[np.uint32]) -> NDArray[np.uint32]:
        word = (word ^ word >> np.uint32(16)) * np.uint32(0x21F0AAAD)
        word = (word ^ word >> np.uint32(15)) * np.uint32(0x735A2D97)
        return word ^ word >> np.uint32(15)

    low, high = keys.astype(np.uint32), (keys >> 32).astype(np.uint32)
    return mix(mix(counters.astype(np.uint32) * np.uint32(0x1E3779B1) + low) ^ high)


def random_k_indices(keys: Keys, width: int, k: int) -> NDArray[np.int64]:
    """One position in each of the k strata of a row: floor of a uniform number with 24 bits times the stratum."""
    draw = (random_bits(keys[:, None], np.arange(k)) >> np.uint32(8)) / 2.0**24
    return np.arange(k) * (width // k) + np.floor(draw * (width // k)).astype(np.int64)


def random_k(x: Array, keys: Keys, k: int, unbiased: bool = True) -> Array:
    """Zero all but the drawn entries; scale by width / k if unbiased."""
    kept = np.zeros_like(x)
    for row, out, positions in zip(x, kept, random_k_indices(keys, x.shape[1], k), strict=True):
        out[positions] = row[positions] * (len(row) / k if unbiased else 1)
    return kept


def dare_slots(width: int, drop: float) -> tuple[int, float]:
    """Slots of a row, and E min(K, slots) / width for binomial K, for widths whose coefficients a float holds."""
    p = 1 - drop
    slots = min(width, int(np.ceil(width * p + np.sqrt(width * p * drop))))
    chances = [math.comb(width, j) * p**j * drop ** (width - j) for j in range(width + 1)]
    return slots, sum(min(j, slots) * chance for j, chance in enumerate(chances)) / width


def dare_indices(keys: Keys, width: int, drop: float) -> list[list[int]]:
    """Kept positions of each row: geometric gaps by inversion, from a random start around the end of the row."""
    slots, _ = dare_slots(width, drop)
    draws = random_bits(keys[:, None], np.arange(slots + 1))
    rows = []
    for row in draws:
        at, positions = -1, []
        for word in row[:-1]:
            at += 1 + (int(np.floor(np.log1p(-int(word) / 2**32) / np.log(drop))) if drop else 0)
            positions.append(at)
        start = int(row[-1]) * width >> 32
        rows.append([(at + start) % width for at in positions if at < width])
    return rows


def dare(x: Array, keys: Keys, drop: float, rescale: float | None = None) -> Array:
    """Zero what is dropped; multiply the rest by `rescale`, or by one over the probability that an entry is sent."""
    scale = 1 / dare_slots(x.shape[1], drop)[1] if rescale is None else rescale
    kept = np.zeros_like(x)
    for row, out, positions in zip(x, kept, dare_indices(keys, x.shape[1], drop), strict=True):
        out[positions] = row[positions] * scale
    return kept


def chained(
    x: Array, first: Callable[..., Array], second: Callable[[Array], Array], scale: float = 1, **facts: Keys
) -> Array:
    """Apply `second`, which must not depend on order, to the entries that `first` keeps in each row.

    `scale` is what `first` multiplies entries by after they have travelled.
    """
    kept = first(x, **facts)
    for row, out in zip(x, kept, strict=True):
        positions = np.flatnonzero(out)
        out[positions] = second(row[None, positions])[0] * scale
    return kept
