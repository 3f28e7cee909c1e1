"""`decay_and_project_`: what AdamP and SGDP add to Adam and SGD for the sake of scale-invariant weights."""

import torch
from torch import Tensor

from gradwire.optim.kernels import Scalars
from gradwire.optim.layout import Dims
from gradwire.optim.shards import Shards


def by_rows(shape: torch.Size) -> Dims:
    """Two or more dimensions become `[rows, columns]`, rows being dimension 0; others become a vector."""
    return ((0,), tuple(range(1, len(shape)))) if len(shape) > 1 else (tuple(range(len(shape))),)


def thresholds(sizes: Tensor, delta: float) -> Scalars:
    """Unrelated vectors of n entries rarely have |cos| below delta / sqrt(n), since sqrt(n) cos is about normal.

    Args:
        sizes: `[parameters, 2]`, rows and columns; nothing is needed for vectors.
        delta: Threshold of the test, >= 0.
    """
    if sizes.shape[1] == 1:
        return {}
    return {"row_threshold": delta * sizes[:, 1] ** -0.5, "matrix_threshold": delta * sizes.prod(1) ** -0.5}


def decay_and_project_(
    params: list[Tensor], updates: list[Tensor], grads: list[Tensor], scalars: Scalars, shards: Shards
) -> list[Tensor]:
    """Decay weights, and where they are scale-invariant do it less and project their updates, both in place.

    Args:
        params: Vectors or `[rows, columns]`.
        updates: What will be subtracted from them.
        grads: Their gradients.
        scalars: `decay`, `wd_ratio`, and what `project_` takes.
        shards: Sums over whole weights.

    Returns:
        Small intermediates that the compiler must store.
    """
    if params[0].ndim == 1:
        torch._foreach_mul_(params, 1 - scalars["decay"])
        return []
    projected, radials = project_(updates, params, grads, scalars, shards)
    one = params[0].new_ones(())
    kept = [1 - scalars["decay"] * torch.where(p, scalars["wd_ratio"], one) for p in projected]
    torch._foreach_mul_(params, kept)
    return [*radials, *kept]


def project_(
    updates: list[Tensor], params: list[Tensor], grads: list[Tensor], scalars: Scalars, shards: Shards
) -> tuple[list[Tensor], list[Tensor]]:
    """Project each update onto the tangent space of its weight, in place, if the weight is scale-invariant.

        u <- u - w <w, u> / (|w| + eps)^2    if max |<g, w>| / (|g| |w|) < delta / sqrt(n)

    The loss does not depend on the length of a weight that a normalisation follows, so its gradient is orthogonal to
    it. This is tested, and the projection done, per row (a channel's n weights), else on the whole matrix. The sums of
    each row decide everything, without branches, so that one pass over memory gathers all of them.

    Args:
        updates: `[rows, columns]` each, changed in place.
        params: The weights w.
        grads: The gradients g.
        scalars: `thresholds`, and `eps`: the least norm in the test, added to the norm in the projection.
        shards: Sums over whole weights; at most two collectives for all of them.

    Returns:
        0-d bools, which were projected; `[rows]` each, what multiple of each row of w was taken out.
    """
    sums: list[Tensor] = []
    for update, param, grad in zip(updates, params, grads, strict=True):
        norms = torch.linalg.vector_norm(param, dim=1), torch.linalg.vector_norm(grad, dim=1)
        sums += [(param * grad).sum(1), (param * update).sum(1), norms[0].square(), norms[1].square()]
    sums = shards.sum(sums, dim=1)
    rows = [sums[i : i + 4] for i in range(0, len(sums), 4)]

    totals: list[Tensor] = []
    for (wg, wu, ww, gg), threshold, eps in zip(rows, scalars["row_threshold"], scalars["eps"], strict=True):
        related = ~(_cosine(wg, ww, gg, eps) < threshold)
        totals += [x.sum() for x in (related.to(wg.dtype), wg, wu, ww, gg)]
    totals = shards.sum(totals, dim=0)

    projected, radials = [], []
    for i, (update, param, threshold) in enumerate(zip(updates, params, scalars["matrix_threshold"], strict=True)):
        eps = scalars["eps"][i]
        (_, wu, ww, _), (related_rows, wg_all, wu_all, ww_all, gg_all) = rows[i], totals[5 * i : 5 * i + 5]
        by_row, by_matrix = related_rows == 0, _cosine(wg_all, ww_all, gg_all, eps) < threshold
        radial_by_matrix = torch.where(by_matrix, wu_all / (ww_all.sqrt() + eps).square(), 0.0)
        radial = torch.where(by_row, wu / (ww.sqrt() + eps).square(), radial_by_matrix)
        update.addcmul_(param, radial.unsqueeze(1), value=-1)
        projected.append(by_row | by_matrix)
        radials.append(radial)
    return projected, radials


def _cosine(wg: Tensor, ww: Tensor, gg: Tensor, eps: float | Tensor) -> Tensor:
    return wg.abs() / ww.sqrt().clamp(min=eps) / gg.sqrt().clamp(min=eps)
