"""Bit packing: rows of small unsigned integers in as few bytes as they need.

Value i of a row stands in bits [i * bits, (i + 1) * bits) of the row, bit j being bit j % 8 of byte j // 8
(little-endian order), and each row is padded to a whole byte. So rows can be cut, joined and sent on their own.

All groups of values that fill whole bytes are assembled at once, one of their bytes (15 at most) after the other. This
is for positions, one in a hundred entries. Every entry's 1, 2 or 4 bits are packed faster in `planes`.
"""

import math

import torch
from torch import Tensor


def packed_columns(columns: int, bits: int) -> int:
    """Bytes of a row of `columns` values of `bits` bits each."""
    return -(-columns * bits // 8)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack rows of unsigned integers.

    Args:
        values: `[rows, columns]` of an integer dtype or bool, each in [0, 2^bits).
        bits: Width of a value, 1..16.

    Returns:
        uint8 `[rows, packed_columns(columns, bits)]`.

    Example:
        >>> pack(torch.tensor([[1, 2, 3]]), bits=4)
        tensor([[33,  3]], dtype=torch.uint8)
    """
    columns, per_group = values.shape[1], _values_per_group(bits)
    is_bool = values.dtype == torch.bool
    values = values.view(torch.uint8) if is_bool else values.to(torch.uint8 if bits <= 8 else torch.int32)
    if columns % per_group:
        values = torch.nn.functional.pad(values, (0, -columns % per_group))
    if bits == 8:
        return values
    packed = _pack_group(values, bits)
    return packed[:, : packed_columns(columns, bits)].contiguous()


def unpack(packed: Tensor, columns: int, bits: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Inverse of `pack`: `[rows, columns]` of `dtype`, which must hold 2^bits - 1.

    Example:
        >>> unpack(torch.tensor([[33, 3]], dtype=torch.uint8), columns=3, bits=4)
        tensor([[1, 2, 3]], dtype=torch.int32)
    """
    if bits == 8:
        return packed.to(dtype)
    values = _unpack_group(packed, bits)
    return values[:, :columns].to(dtype)


def _values_per_group(bits: int) -> int:
    """Values in the shortest run that fills whole bytes."""
    return 8 // math.gcd(bits, 8)


def _pack_group(values: Tensor, bits: int) -> Tensor:
    """Assemble byte after byte of all groups at once, each from the values whose bits it holds."""
    per_group = _values_per_group(bits)
    group = values.int().reshape(values.shape[0], values.shape[1] // per_group, per_group)
    packed = values.new_empty((*group.shape[:2], per_group * bits // 8), dtype=torch.uint8)
    for byte in range(packed.shape[2]):
        first, last = 8 * byte // bits, (8 * byte + 7) // bits
        word = group[..., first] >> 8 * byte - first * bits
        for i in range(first + 1, last + 1):
            word = word | group[..., i] << i * bits - 8 * byte
        packed[..., byte] = word & 0xFF
    return packed.flatten(1)


def _unpack_group(packed: Tensor, bits: int) -> Tensor:
    """Assemble value after value of all groups at once, each from the two or three bytes that hold it."""
    per_group = _values_per_group(bits)
    group_bytes = per_group * bits // 8
    group = torch.nn.functional.pad(packed, (0, -packed.shape[1] % group_bytes)).int()
    group = group.reshape(group.shape[0], group.shape[1] // group_bytes, group_bytes)
    values = torch.empty((*group.shape[:2], per_group), dtype=torch.int32, device=packed.device)
    for i in range(per_group):
        first, last = i * bits // 8, (i * bits + bits - 1) // 8
        word = group[..., first] >> i * bits - 8 * first
        for byte in range(first + 1, last + 1):
            word = word | group[..., byte] << 8 * byte - i * bits
        values[..., i] = word & (1 << bits) - 1
    return values.flatten(1)
