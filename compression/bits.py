"""Bit packing: rows of small unsigned integers in as few bytes as they need.

Value i of a row stands in bits [i * bits, (i + 1) * bits) of the row, bit j being bit j % 8 of byte j // 8
(little-endian order), and each row is padded to a whole byte. So rows can be cut, joined and sent on their own.

Widths 1, 2 and 4 treat the 8 / bits values of one byte as one machine word: packing is a multiplication and a shift of
that word, unpacking a few shifts of it or, for single bits, a look-up. They run at the speed of memory, eager, on CPU
and CUDA (hosts are little-endian). Other widths assemble the bytes of one group of values, at most 15, in turn.
"""

import math

import torch
from torch import Tensor

_WORD = {1: torch.int64, 2: torch.int32, 4: torch.int16}  # bits -> word that holds one byte's values, a byte each


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
    packed = _pack_word(values, bits) if bits in _WORD else _pack_group(values, bits)
    return packed[:, : packed_columns(columns, bits)].contiguous()


def unpack(packed: Tensor, columns: int, bits: int, dtype: torch.dtype = torch.int32) -> Tensor:
    """Inverse of `pack`: `[rows, columns]` of `dtype`, which must hold 2^bits - 1.

    Example:
        >>> unpack(torch.tensor([[33, 3]], dtype=torch.uint8), columns=3, bits=4)
        tensor([[1, 2, 3]], dtype=torch.int32)
    """
    if bits == 8:
        return packed.to(dtype)
    if bits == 1:
        values = _look_up(packed, _bits_of_bytes(packed.device))
    elif bits in _WORD:
        values = _unpack_word(packed, bits)
    else:
        values = _unpack_group(packed, bits)
    return values[:, :columns].to(dtype)


def pack_signs(x: Tensor) -> Tensor:
    """One bit per entry of `x` `[rows, width]`, 1 for x >= 0: uint8 `[rows, ceil(width / 8)]`."""
    return pack(x >= 0, 1)


def unpack_signs(packed: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `pack_signs`: `[rows, width]` of +1 and -1."""
    signs = _bits_of_bytes(packed.device) * 2 - 1
    return _look_up(packed, signs)[:, :width].to(dtype)


def _values_per_group(bits: int) -> int:
    """Values in the shortest run that fills whole bytes."""
    return 8 // math.gcd(bits, 8)


def _pack_word(values: Tensor, bits: int) -> Tensor:
    """Gather the values of a word, one in each byte, in the word's top byte by one multiplication.

    Byte i of n moves up by 8 (n - 1) - (8 - bits) i. No two products of the multiplication meet, so nothing carries.
    """
    per_byte = 8 // bits
    factor = sum(1 << (8 * (per_byte - 1) - (8 - bits) * i) for i in range(per_byte))
    words = values.reshape(-1).view(_WORD[bits]) * factor
    packed = words.bitwise_right_shift_(8 * (per_byte - 1)).to(torch.uint8)
    return packed.view(values.shape[0], values.shape[1] // per_byte)


def _unpack_word(packed: Tensor, bits: int) -> Tensor:
    """Spread the values of each byte over the bytes of a word: `[rows, 8 / bits * bytes]`."""
    word = packed.to(_WORD[bits])
    spread = word.clone()
    for i in range(1, 8 // bits):
        spread |= word << (8 - bits) * i
    spread &= sum((1 << bits) - 1 << 8 * i for i in range(8 // bits))
    return spread.view(torch.uint8)


def _bits_of_bytes(device: torch.device) -> Tensor:
    """The bits of every byte: int8 `[256, 8]`."""
    return (torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1).to(torch.int8)


def _look_up(packed: Tensor, table: Tensor) -> Tensor:
    """Replace each byte by its row of an int8 table `[256, 8]`, moved as one word: `[rows, 8 * bytes]`."""
    words = table.view(torch.int64).view(1, 256).expand(packed.shape[0], 256)
    return words.gather(1, packed.long()).view(torch.int8)


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
