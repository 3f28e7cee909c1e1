"""`Uniforms`: random numbers that are a function of (seed, step) alone, drawn in blocks."""

from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from gradwire.compression import counter_rng

_BLOCK = 512


@final
class Uniforms:
    """One uniform number in [0, 1), of 32 bits, for every seed and step.

    Args:
        seeds: One stream each; equal ones are drawn once.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        different = {seed: place for place, seed in enumerate(dict.fromkeys(seeds))}
        self._stream = np.array([different[seed] for seed in seeds])
        self._keys = torch.tensor([counter_rng.fold("random walk", seed) for seed in different], dtype=torch.int64)
        self._number = -1
        self._block: NDArray[np.float64] = np.empty((0, 0))

    def at(self, step: int) -> NDArray[np.float64]:
        """Those of a step: `[seeds]`."""
        number, place = divmod(step, _BLOCK)
        if number != self._number:
            counters = torch.arange(number * _BLOCK, (number + 1) * _BLOCK, dtype=torch.int64)
            bits = counter_rng.bits(self._keys, counters[:, None])
            self._number, self._block = number, bits.numpy() * 2.0**-32
        row: NDArray[np.float64] = self._block[place, self._stream]
        return row
