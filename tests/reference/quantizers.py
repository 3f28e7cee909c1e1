"""Float64 NumPy references of the quantising compressors, written from the formats' and papers' definitions."""

import numpy as np
from reference.sparsifiers import Array, Keys, random_bits

FORMATS = {  # mantissa bits, exponent of the smallest normal number, largest number
    "bfloat16": (7, -126, (2 - 2.0**-7) * 2.0**127),
    "float16": (10, -14, 65504.0),
    "float8_e4m3fn": (3, -6, 448.0),
    "float8_e5m2": (2, -14, 57344.0),
}


def round_to_integer(y: Array, keys: Keys | None) -> Array:
    """To nearest, ties to even; with keys, up if a uniform number with 24 bits lies below the fraction."""
    if keys is None:
        return np.round(y)
    uniform = (random_bits(keys[:, None], np.arange(y.shape[1])) >> np.uint32(8)) / 2.0**24
    return np.floor(y) + (uniform < y - np.floor(y))


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
