"""Counter-based random numbers: a hash of (key, counter), equal on every device, with no generator and no state.

The mixer is the 32-bit xor-shift-multiply hash found by C. Wellons' hash prospector (constants 0x21f0aaad, 0x735a2d97),
applied twice. Arithmetic is int64 on 32-bit values, so that products never overflow and eager, compiled, CPU and CUDA
code give the same bits.
"""

import hashlib

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_GOLDEN = 0x1E3779B1  # odd, below 2^31


def _mix(x: Tensor) -> Tensor:
    """Hash int64 values in [0, 2^32) to int64 values in [0, 2^32)."""
    x = (x ^ (x >> 16)) * 0x21F0AAAD & _MASK32
    x = (x ^ (x >> 15)) * 0x735A2D97 & _MASK32
    return x ^ (x >> 15)


def fold(*words: int | str) -> int:
    """Hash integers and strings on the host to a 62-bit key, equal in every process."""
    digest = hashlib.blake2b(repr(words).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def row_keys(seed: int, rows: int, device: torch.device | str | None = None, *, first: int = 0) -> Tensor:
    """Keys `[rows]` int64 in [0, 2^62) of rows first, first + 1, ... of a tensor whose key is `seed`.

    A row's key depends on the seed and the row's number only, so a shard of rows has the keys that the whole has.
    """
    word = fold(seed)
    index = torch.arange(first, first + rows, dtype=torch.int64, device=device)
    low = _mix((index * _GOLDEN + (word & _MASK32)) & _MASK32)
    high = _mix(low ^ (word >> 31))
    return (high & 0x3FFFFFFF) << 32 | low


def at_step(keys: Tensor, step_key: Tensor | int) -> Tensor:
    """New keys: `keys` mixed with those of a step or worker, `fold(seed, step)` or a tensor that broadcasts."""
    low = _mix((keys & _MASK32) ^ (step_key & _MASK32))
    high = _mix((keys >> 32) ^ (step_key >> 31) ^ low)
    return (high & 0x3FFFFFFF) << 32 | low


def bits(keys: Tensor, counters: Tensor) -> Tensor:
    """32 random bits as int64 in [0, 2^32), for each key and counter, broadcast against each other.

    Cost: about 20 integer operations an element; fuses under `torch.compile`.
    """
    x = _mix((counters * _GOLDEN + (keys & _MASK32)) & _MASK32)
    return _mix(x ^ (keys >> 32))


def uniform(keys: Tensor, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1) with 24 random bits: `[len(keys), columns]`."""
    counters = torch.arange(columns, dtype=torch.int64, device=keys.device)
    return (bits(keys[:, None], counters) >> 8).to(dtype) * 2.0**-24
