"""Unbiased rounding, to integers and to narrow floating-point formats."""

import torch
from torch import Tensor

from gradwire.compression import counter_rng


def stochastic_round(x: Tensor, keys: Tensor | None) -> Tensor:
    """Round each entry of `x` `[rows, columns]` up with the probability of its fractional part, else down."""
    assert keys is not None
    return round_up_below(x, counter_rng.uniform(keys, x.shape[1]))


def round_up_below(x: Tensor, uniform: Tensor) -> Tensor:
    """Round up where the fractional part exceeds a random number in [0, 1), else down.

    The fraction is compared with the random number, not added to it: the sum would be rounded, and integers would not
    always stay what they are.
    """
    low = x.floor()
    return low + (uniform < x - low)


def round_to_levels(x: Tensor, step: Tensor, levels: int, keys: Tensor | None) -> Tensor:
    """The multiple of its row's `step` to which each entry is rounded: a whole number from -levels to levels.

    Args:
        x: `[rows, columns]` float32, no magnitude above `levels` steps.
        step: `[rows, 1]`, 0 for a row of zeros.
        levels: The largest multiple, >= 1.
        keys: Random keys `[rows]` to round without bias; None to round to nearest, ties to even.
    """
    # Division, since the reciprocal of a step below 3e-39 is infinite; a step of zero divides nothing.
    scaled = x / torch.where(step == 0, torch.inf, step)
    level = scaled.round() if keys is None else stochastic_round(scaled, keys)
    # A step with few bits left (below 1e-38) can put the largest entry beyond the last level.
    return level.clamp(-levels, levels)


def binade(x: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent field e (int32) and fraction f in [0, 1) of float32 numbers >= 0: x = 2^(e - 127) (1 + f).

    Below 2^-126 e is 0 and x = 2^-126 f; for infinity and NaN e is 255.
    """
    word = x.view(torch.int32)
    return word >> 23, (word & 0x7FFFFF) * 2.0**-23


def power_of_two(exponent: Tensor) -> Tensor:
    """2^(e - 127) as float32 for an exponent field e (int32) from 1 to 254; 0 for 0, infinity for 255."""
    return (exponent << 23).view(torch.float32)


def round_to_format(x: Tensor, dtype: torch.dtype, uniform: Tensor) -> Tensor:
    """Round float32 to a number of a narrower format, up or down with expectation x.

    Args:
        x: Any shape.
        dtype: A floating-point format of 16 or 8 bits.
        uniform: Random numbers in [0, 1), of the shape of x.

    Returns:
        Numbers of that format as float32; infinite beyond its range once converted.
    """
    x = x.float()
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2^exponent: the sign and fraction cleared
    quantum = power.clamp(min=torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
    return round_up_below(x / quantum, uniform) * quantum
