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
