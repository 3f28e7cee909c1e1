"""`project_`: takes the radial part out of an update to a scale-invariant weight, for AdamP and its SGD twin."""

import math

import torch
from torch import Tensor

from gradwire.optim.kernels import Dims


def by_rows(shape: torch.Size) -> Dims:
    """Two or more dimensions become `[rows, columns]`, rows being dimension 0; others become a vector."""
    return ((0,), tuple(range(1, len(shape)))) if len(shape) > 1 else (tuple(range(len(shape))),)


def project_(
    update: Tensor, param: Tensor, grad: Tensor, *, delta: float | Tensor, eps: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Project an update onto the tangent space of the weight, in place, if the weight is scale-invariant.

        u <- u - w <w, u> / (|w| + eps)^2    if max |<g, w>| / (|g| |w|) < delta / sqrt(n)

    The loss does not depend on the length of a weight that a normalisation follows, so its gradient is orthogonal to
    it. This is tested, and the projection done, per row (a channel's n weights), else on the whole matrix. The sums of
    each row decide everything, without branches, so that one pass over memory gathers all of them.

    Args:
        update: `[rows, columns]`, changed in place.
        param: The weight w.
        grad: The gradient g.
        delta: Threshold of the test, >= 0.
        eps: Least norm in the test, and added to the norm in the projection.

    Returns:
        0-d bool, whether it was projected; `[rows]`, what multiple of each row of w was taken out.
    """
    rows, columns = param.shape
    wg, wu = (param * grad).sum(1), (param * update).sum(1)
    w, g = torch.linalg.vector_norm(param, dim=1), torch.linalg.vector_norm(grad, dim=1)
    by_row = _orthogonal(wg, w, g, columns, delta, eps)

    all_w, all_g = torch.linalg.vector_norm(w), torch.linalg.vector_norm(g)
    by_matrix = _orthogonal(wg.sum(), all_w, all_g, rows * columns, delta, eps)

    radial_by_matrix = torch.where(by_matrix, wu.sum() / (all_w + eps).square(), 0.0)
    radial = torch.where(by_row, wu / (w + eps).square(), radial_by_matrix)
    update.addcmul_(param, radial.unsqueeze(1), value=-1)
    return by_row | by_matrix, radial


def _orthogonal(wg: Tensor, w: Tensor, g: Tensor, n: int, delta: float | Tensor, eps: float | Tensor) -> Tensor:
    """Whether |cos| stays below delta / sqrt(n) everywhere; for unrelated vectors sqrt(n) cos is about normal."""
    return (wg.abs() / w.clamp(min=eps) / g.clamp(min=eps)).max() < delta / math.sqrt(n)
