"""`orthogonalize_`: the nearest orthonormal matrix, batched over matrices of equal shapes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradwire.comm.orthogonalize import newton_schulz


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
