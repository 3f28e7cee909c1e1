"""Unbiased rounding to integers."""

from torch import Tensor

from gradwire.compression import counter_rng


def stochastic_round(x: Tensor, keys: Tensor | None) -> Tensor:
    """Round each entry of `x` `[rows, columns]` up with the probability of its fractional part, else down.

    The fraction is compared with the random number, not added to it: the sum would be rounded, and integers would not
    always stay what they are.
    """
    assert keys is not None
    low = x.floor()
    return low + (counter_rng.uniform(keys, x.shape[1]) < x - low)
