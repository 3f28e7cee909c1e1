"""Maps of an update before a step is taken along it: its sign, or the nearest orthonormal matrix."""

from collections.abc import Mapping, Sequence, Set
from typing import Literal

import torch
from torch import Tensor

from gradwire.comm.orthogonalize import newton_schulz

BaseMap = Literal["sign", "identity", "orthogonalized"]


def map_(base: BaseMap, updates: Mapping[Tensor, Tensor], vectors: Set[Tensor], *, rest: bool) -> None:
    """Map the updates of parameters, in place.

    Args:
        base: The map.
        updates: By parameter.
        vectors: Parameters that are no matrices, whatever their shape: of them, "orthogonalized" takes the sign.
        rest: Whether to do so here.
    """
    others = vectors | {p for p, update in updates.items() if update.ndim < 2}
    if base == "orthogonalized":
        orthogonalize_([update for p, update in updates.items() if p not in others])
    signed = [updates[p] for p in updates if base == "sign" or p in others]
    if rest and signed and base != "identity":
        torch._foreach_sign_(signed)


def orthogonalize_(matrices: Sequence[Tensor]) -> None:
    """Replace each matrix U S V^T by about U V^T, in place; of more dimensions, the first is taken against the rest.

    Singular values below a thousandth of the matrix's norm stay small; a zero matrix stays zero.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 0.5]])
        >>> orthogonalize_([x])
        >>> x
        tensor([[1., 0.],
                [0., 1.]])

    Reference:
        Muon's update (K. Jordan et al., 2024), by the cubic Newton-Schulz iteration.
    """
    shapes: dict[tuple[int, int, torch.dtype], list[Tensor]] = {}
    for matrix in matrices:
        if matrix.numel():
            shapes.setdefault((matrix.shape[0], matrix[0].numel(), matrix.dtype), []).append(matrix)
    for (lines, columns, _), alike in shapes.items():
        stacked = torch.stack([matrix.reshape(lines, columns) for matrix in alike])
        made = newton_schulz(stacked.mT).mT if lines < columns else newton_schulz(stacked)
        for matrix, result in zip(alike, made, strict=True):
            matrix.copy_(result.reshape(matrix.shape))
