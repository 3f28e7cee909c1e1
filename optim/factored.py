"""Sums of squares by rows and by columns, and where to keep them: the factored second moment of `Adafactor`."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

FactoredDims = Literal["last", "largest"]

_BLOCK = 1 << 19  # 2 MiB of float32: a block of squares stays in the cache while the next ones are added to it
_ROWS = 16
_SMALL = 1 << 15  # as in `compiled`: below, everything stays in the cache


def factored_order(shape: Sequence[int], which: FactoredDims, min_size: int) -> tuple[int, ...] | None:
    """Dimensions with the two factored ones last, in their order; None if the tensor is not to be factored.

    Args:
        shape: Any.
        which: Factor the last two dimensions or the two largest; of equals, the later one counts as larger.
        min_size: Least size of a factored dimension.
    """
    dims = range(len(shape))
    by_size = sorted(dims, key=shape.__getitem__)
    chosen = sorted((dims if which == "last" else by_size)[-2:])
    if len(chosen) < 2 or min(shape[d] for d in chosen) < min_size:
        return None
    return (*(d for d in dims if d not in chosen), *chosen)


def zeros_reduced(param: Tensor, order: tuple[int, ...], reduced: int, dtype: torch.dtype) -> Tensor:
    """Zeros in the shape of a parameter after a sum over one dimension, which is kept with size 1.

    Args:
        param: Its shape, device and, of a `DTensor`, its shards; nobody has a part of the dimension summed over.
        order: A permutation of its dimensions, which comes first.
        reduced: The dimension of the permuted tensor.
        dtype: Of the result.
    """

    def shape(x: Tensor) -> list[int]:
        return [1 if i == reduced else x.shape[d] for i, d in enumerate(order)]

    if not isinstance(param, DTensor):
        return param.new_zeros(shape(param), dtype=dtype)

    def moved(placement: Placement) -> Placement:
        if not isinstance(placement, Shard):
            return placement
        dim = order.index(placement.dim)
        if dim == reduced:
            return Replicate()
        return placement if dim == placement.dim else Shard(dim)

    shard = param.to_local()
    whole = torch.empty(shape(param), device="meta")
    zeros: Tensor = DTensor.from_local(
        shard.new_zeros(shape(shard), dtype=dtype),
        param.device_mesh,
        [moved(placement) for placement in param.placements],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return zeros


def row_column_sums(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Sums of squares over the last dimension, `[..., rows, 1]`, and the one before it, `[..., 1, columns]`.

    On the CPU, which reads memory by lines: sums of columns that walk down one column after the other are slow.
    """
    if tensors[0].device.type != "cpu" or tensors[0].numel() < _SMALL or torch.is_grad_enabled():
        return _squared_norms(tensors, -1), _squared_norms(tensors, -2)
    if not torch.compiler.is_compiling():
        return _streamed_sums(tensors)
    in_blocks = tensors[0].ndim < 4  # others are the kernels of convolutions, of few rows
    return _squared_norms(tensors, -1), [_column_sums(x) for x in tensors] if in_blocks else _squared_norms(tensors, -2)


def _squared_norms(tensors: list[Tensor], dim: int) -> list[Tensor]:
    norms = [torch.linalg.vector_norm(x, dim=dim, keepdim=True) for x in tensors]
    return list(torch._foreach_mul(norms, norms))


def _column_sums(x: Tensor) -> Tensor:
    """For the compiler: in blocks of rows, few enough that memory is read in as many streams. None has 0 or 1 block."""
    *batch, rows, columns = x.shape
    blocks = rows // _ROWS + 2
    padded = torch.nn.functional.pad(x, (0, 0, 0, blocks * _ROWS - rows))
    return padded.view(*batch, blocks, _ROWS, columns).square().sum(-2).sum(-2, keepdim=True)


def _streamed_sums(tensors: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """In one pass over memory, with temporaries of `_BLOCK` entries at most."""
    row_sums = [x.new_empty((*x.shape[:-1], 1)) for x in tensors]
    column_sums = [x.new_empty((*x.shape[:-2], 1, x.shape[-1])) for x in tensors]
    for x, by_row, by_column in zip(tensors, row_sums, column_sums, strict=True):
        *batch, rows, columns = x.shape
        n = math.prod(batch)
        at_once, height = max(1, _BLOCK // max(1, rows * columns)), max(1, _BLOCK // max(1, columns))
        for some, norms, sums in zip(
            torch.split(x.view(n, rows, columns), at_once),
            torch.split(by_row.view(n, rows), at_once),
            torch.split(by_column.view(n, columns), at_once),
            strict=True,
        ):
            squares = x.new_zeros((len(some), min(height, rows), columns))
            for block, norm in zip(torch.split(some, height, 1), torch.split(norms, height, 1), strict=True):
                torch.linalg.vector_norm(block, dim=2, out=norm)
                squares[:, : block.shape[1]].addcmul_(block, block)
            torch.sum(squares, 1, out=sums)
        by_row.square_()
    return row_sums, column_sums
