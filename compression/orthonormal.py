"""Orthonormal changes of basis of tiles, as products with small matrices."""

import functools
import math
from typing import Literal

import torch
from torch import Tensor

from gradwire.compression import counter_rng
from gradwire.compression.tiles import Tile

Transform = Literal["dct", "random", "none"]

_BLOCK_ENTRIES = 1 << 18  # 1 MiB of float32: what one product writes is still in the cache when the next one reads it


def dct_matrix(size: int) -> Tensor:
    """The orthonormal DCT-II: `[size, size]` float64, line k being the k-th cosine.

        C[k, n] = s_k cos(pi (n + 1/2) k / size),  s_0 = sqrt(1 / size),  s_k = sqrt(2 / size)

    Example:
        >>> dct_matrix(2).round(decimals=3)
        tensor([[ 0.7070,  0.7070],
                [ 0.7070, -0.7070]], dtype=torch.float64)
    """
    k = torch.arange(size, dtype=torch.float64)
    cosines = torch.cos(math.pi / size * torch.outer(k, k + 0.5))
    cosines[0] *= math.sqrt(0.5)
    return cosines * math.sqrt(2 / size)


def random_matrix(size: int) -> Tensor:
    """A fixed orthogonal matrix from the uniform (Haar) distribution: `[size, size]` float64, equal everywhere."""
    keys = counter_rng.row_keys(counter_rng.fold("random_matrix", size), size)
    u = counter_rng.uniform(keys, 2 * size, torch.float64)
    gaussian = torch.sqrt(-2 * torch.log1p(-u[:, :size])) * torch.cos(2 * torch.pi * u[:, size:])
    q, r = torch.linalg.qr(gaussian)
    haar: Tensor = q * r.diagonal().sign()
    return haar


def transform_rows(x: Tensor, tile: Tile, transform: Transform, *, inverse: bool = False) -> Tensor:
    """Change the basis of every row `[rows, tile.numel]`: `A X B^T` for its tile X, or `A^T X B`; a new tensor.

    A vector's lines are transformed along their width alone.

    Cost:
        2 (height + width) operations an entry.
    """
    across = _matrix(tile.width, transform, x.dtype, x.device)
    down = _matrix(tile.height, transform, x.dtype, x.device) if tile.matrix else None
    if inverse:
        across, down = across.T, None if down is None else down.T
    out = torch.empty_like(x)
    block = max(1, _BLOCK_ENTRIES // tile.numel) if x.device.type == "cpu" else max(1, len(x))
    for some, result in zip(torch.split(x, block), torch.split(out, block), strict=True):
        lines = some.reshape(-1, tile.width)
        if down is None:
            torch.mm(lines, across.T, out=result.view(-1, tile.width))
        else:
            tiles = torch.mm(lines, across.T).view(-1, tile.height, tile.width)
            torch.matmul(down, tiles, out=result.view(-1, tile.height, tile.width))
    return out


@functools.lru_cache(maxsize=256)
def _matrix(size: int, transform: Transform, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        made = dct_matrix(size) if transform == "dct" else random_matrix(size)
        return made.to(dtype=dtype, device=device)
