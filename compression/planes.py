"""Bit packing in planes: 8 / bits values of 1, 2 or 4 bits share a byte, each from another plane of the row.

A row is cut into p = 8 / bits planes of n = ceil(columns / p) neighbours; byte i holds value i of every plane, the
first plane in the lowest bits. So packing is p contiguous slices shifted and joined, and unpacking the inverse:
operations that vector units and compilers take as they are, and that fuse with the arithmetic around them.
"""

import torch
from torch import Tensor


def pack_planes(values: Tensor, bits: int) -> Tensor:
    """Pack rows of unsigned integers.

    Args:
        values: `[rows, columns]` of uint8 or bool, each in [0, 2^bits).
        bits: Width of a value: 1, 2, 4 or 8.

    Returns:
        uint8 `[rows, ceil(columns bits / 8)]`.

    Example:
        >>> pack_planes(torch.tensor([[1, 2, 3]], dtype=torch.uint8), bits=4)
        tensor([[49,  2]], dtype=torch.uint8)
    """
    planes = 8 // bits
    if values.shape[1] % planes:
        values = torch.nn.functional.pad(values, (0, -values.shape[1] % planes))
    # Inductor vectorises shifts of int32 and not of uint8 (8 ms against 90 for 2^24 bits); eager, uint8 moves less.
    packed, *others = values.to(torch.int32 if torch.compiler.is_compiling() else torch.uint8).chunk(planes, dim=1)
    for i, plane in enumerate(others, start=1):
        packed = packed | plane << bits * i
    return packed.to(torch.uint8)


def unpack_planes(packed: Tensor, columns: int, bits: int) -> Tensor:
    """Inverse of `pack_planes`: uint8 `[rows, columns]`.

    Example:
        >>> unpack_planes(torch.tensor([[49, 2]], dtype=torch.uint8), columns=3, bits=4)
        tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    values = (packed[:, None, :] >> shifts[:, None]) & (1 << bits) - 1
    return values.flatten(1)[:, :columns]
