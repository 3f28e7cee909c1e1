"""Position and sign of some entries of a row in one code each, with a way to say zero.

The code of a positive entry at position i is 2 i, of a negative one 2 i + 1. Codes of one row may repeat: the same code
twice means what it means once, and the two codes of one position cancel. So an entry that is zero repeats the code of
the row's largest, and a row of zeros sends codes that cancel; both cost nothing. A single code has no partner to cancel
with: alone, it has one value more, for zero.
"""

import torch
from torch import Tensor

from gradwire.compression import bits
from gradwire.compression.base import Part


def code_part(k: int, width: int) -> Part:
    """The codes of k entries of a row of `width`."""
    return Part("codes", torch.uint8, bits.packed_columns(k, code_bits(k, width)))


def code_bits(k: int, width: int) -> int:
    """Bits of a code: of 2 width values, or one more for a single code."""
    return (2 * width - 1 if k > 1 else 2 * width).bit_length()


def pack_codes(values: Tensor, indices: Tensor, width: int) -> Tensor:
    """Signs of `values [rows, k]` and their `indices` in a row of `width`, in the form of `code_part`."""
    k = values.shape[1]
    codes = 2 * indices + (values < 0)
    largest = codes.gather(1, values.abs().argmax(dim=1, keepdim=True))
    codes = torch.where(values == 0, largest, codes)
    nothing = torch.arange(k, device=codes.device) % 2 if k > 1 else codes.new_full((1,), 2 * width)
    codes = torch.where((values == 0).all(dim=1, keepdim=True), nothing, codes)
    return bits.pack(codes, code_bits(k, width))


def unpack_codes(packed: Tensor, k: int, width: int) -> Tensor:
    """Codes int64 `[rows, k]`."""
    return bits.unpack(packed, k, code_bits(k, width), torch.int64)


def signs(packed: Tensor, k: int, width: int) -> Tensor:
    """What the codes say: -1, 0 and 1 as float32 `[rows, width]`."""
    said = torch.zeros((packed.shape[0], 2 * width + 2), device=packed.device)
    said.scatter_(1, unpack_codes(packed, k, width), 1.0)
    return said[:, : 2 * width : 2] - said[:, 1 : 2 * width : 2]
