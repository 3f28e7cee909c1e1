"""Float64 NumPy references of the quantising compressors, written from the formats' and papers' definitions."""

from collections.abc import Callable

import numpy as np
from reference.sparsifiers import Array, Keys, random_bits

FORMATS = {  # mantissa bits, exponent of the smallest normal number, largest number
    "bfloat16": (7, -126, (2 - 2.0**-7) * 2.0**127),
    "float16": (10, -14, 65504.0),
    "float8_e4m3fn": (3, -6, 448.0),
    "float8_e5m2": (2, -14, 57344.0),
}


def uniform(keys: Keys, columns: int) -> Array:
    """Uniform numbers with 24 bits, one row for each key."""
    return (random_bits(keys[:, None], np.arange(columns)) >> np.uint32(8)) / 2.0**24


def round_to_integer(y: Array, keys: Keys | None) -> Array:
    """To nearest, ties to even; with keys, up if a uniform number with 24 bits lies below the fraction."""
    if keys is None:
        return np.round(y)
    return np.floor(y) + (uniform(keys, y.shape[1]) < y - np.floor(y))


def over_scale(x: Array, largest: float) -> tuple[Array, Array]:
    """Rows with their greatest magnitude scaled to `largest`, and the scales; rows of zeros stay zero."""
    scale = np.abs(x).max(axis=1, keepdims=True) / largest
    return np.divide(x, scale, out=np.zeros_like(x), where=scale > 0), scale


def cast(x: Array, dtype: str, keys: Keys | None = None) -> Array:
    """Round to multiples of 2^(exponent - mantissa bits); 8-bit rows are scaled to the format's largest number."""
    mantissa, smallest, largest = FORMATS[dtype]
    x, scale = over_scale(x, largest) if dtype.startswith("float8") else (x, np.float64(1.0))
    _, exponent = np.frexp(x)  # x = fraction 2^exponent with a fraction in [1/2, 1)
    quantum = 2.0 ** (np.maximum(exponent - 1, smallest) - mantissa)
    return round_to_integer(x / quantum, keys) * quantum * scale


def scaled_sign(x: Array) -> Array:
    """Mean magnitude of the row times the sign, zero counting as positive."""
    return np.abs(x).mean(axis=1, keepdims=True) * np.where(x < 0, -1.0, 1.0)


def block_quantize(x: Array, bits: int, keys: Keys | None = None) -> Array:
    """Round to the levels -L..L, L = 2^(bits - 1) - 1 being the row's greatest magnitude."""
    levels, scale = over_scale(x, 2 ** (bits - 1) - 1)
    return round_to_integer(levels, keys) * scale


def between(y: Array, grid: Array, keys: Keys) -> Array:
    """One of the two entries of the ascending grid around y: the upper one with the probability of y's place."""
    lower = np.clip(np.searchsorted(grid, y, side="right") - 1, 0, len(grid) - 2)
    place = (y - grid[lower]) / (grid[lower + 1] - grid[lower])
    return grid[lower + (uniform(keys, y.shape[1]) < place)]


def linear_dithering(x: Array, keys: Keys, levels: int, norm: float) -> Array:
    """Even levels between minus and plus the norm of the row."""
    norms = np.linalg.norm(x, ord=norm, axis=1, keepdims=True)
    return norms * between(x / norms, np.arange(-levels, levels + 1) / levels, keys)


def natural_dithering(x: Array, keys: Keys, levels: int, norm: float) -> Array:
    """Magnitudes between zero, doubling levels and the norm of the row."""
    norms = np.linalg.norm(x, ord=norm, axis=1, keepdims=True)
    grid = np.array([0.0] + [2.0 ** (j - levels) for j in range(1, levels + 1)])
    return norms * np.sign(x) * between(np.abs(x) / norms, grid, keys)


def terngrad(x: Array, keys: Keys, clip: float | None = None) -> Array:
    """Minus, zero or plus the greatest magnitude after clipping at some standard deviations about zero."""
    if clip is not None:
        limit = clip * np.sqrt(np.mean(x**2, axis=1, keepdims=True))
        x = np.sign(x) * np.minimum(np.abs(x), limit)
    return linear_dithering(x, keys, levels=1, norm=np.inf)


def natural_compression(x: Array, keys: Keys) -> Array:
    """The power of two below the magnitude, or the one above it with the probability of its place between them."""
    fraction, exponent = np.frexp(np.abs(x))  # |x| = fraction 2^exponent with a fraction in [1/2, 1)
    up = uniform(keys, x.shape[1]) < 2 * fraction - 1
    return np.sign(x) * np.where(up, 2.0**exponent, 2.0 ** (exponent - 1))


def scaled(x: Array, inner: Callable[..., Array], omega: float, **facts: Keys) -> Array:
    """Divide what an unbiased compressor sends by 1 + omega."""
    return inner(x, **facts) / (1 + omega)
