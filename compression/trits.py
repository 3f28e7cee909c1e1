"""Trit packing in planes: five values of 0, 1 or 2 share a byte, 1.6 bits each.

As in `planes`, a row is cut into 5 planes of n = ceil(columns / 5) neighbours; byte i holds value i of every plane,
that of plane k times 3^k. The largest byte is 242.
"""

import torch
from torch import Tensor

PER_BYTE = 5
LARGEST = 3**PER_BYTE - 1


def packed_columns(columns: int) -> int:
    """Bytes of a row of `columns` values."""
    return -(-columns // PER_BYTE)


def pack_trits(values: Tensor) -> Tensor:
    """Pack rows of values.

    Args:
        values: `[rows, columns]` of any dtype, each 0, 1 or 2.

    Returns:
        uint8 `[rows, ceil(columns / 5)]`.

    Example:
        >>> pack_trits(torch.tensor([[1, 2, 0, 0, 0, 2]]))
        tensor([[ 1, 20]], dtype=torch.uint8)
    """
    # As in `planes`: Inductor vectorises int32, and eager code moves less with uint8.
    values = values.to(torch.int32 if torch.compiler.is_compiling() else torch.uint8)
    if values.shape[1] % PER_BYTE:
        values = torch.nn.functional.pad(values, (0, -values.shape[1] % PER_BYTE))
    packed, *others = values.chunk(PER_BYTE, dim=1)
    for i, plane in enumerate(others, start=1):
        packed = packed + plane * 3**i
    return packed.to(torch.uint8)


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """Inverse of `pack_trits`: uint8 `[rows, columns]`.

    Example:
        >>> unpack_trits(torch.tensor([[1, 20]], dtype=torch.uint8), columns=6)
        tensor([[1, 2, 0, 0, 0, 2]], dtype=torch.uint8)
    """
    rest, planes = packed.int(), []
    for _ in range(PER_BYTE):
        quotient = rest * 0x5556 >> 16  # rest / 3 rounded down, exactly for a byte
        planes.append((rest - 3 * quotient).to(torch.uint8))
        rest = quotient
    return torch.cat(planes, dim=1)[:, :columns]
