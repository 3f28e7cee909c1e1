"""Float64 NumPy reference of LAMB, written from algorithm 2 of the paper."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def lamb(
    w: Array,
    grads: Sequence[Array | None],
    lrs: Sequence[float],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    norm_bounds: tuple[float, float] = (0.0, np.inf),
    trust_clip: bool = False,
    adapt: bool = True,
) -> Array:
    """The weight after one step per gradient; a step without gradient (None) does nothing."""
    w = np.array(w, dtype=np.float64)
    m, v, t = np.zeros_like(w), np.zeros_like(w), 0
    for g, lr in zip(grads, lrs, strict=True):
        if g is None:
            continue
        t += 1
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        first, second = (m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)) if bias_correction else (m, v)
        u = first / (np.sqrt(second) + eps) + weight_decay * w
        weight_norm, update_norm = np.sqrt(np.sum(w**2)), np.sqrt(np.sum(u**2))
        ratio = 1.0
        if adapt and weight_norm > 0 and update_norm > 0:
            ratio = min(max(weight_norm, norm_bounds[0]), norm_bounds[1]) / update_norm
        w = w - lr * (min(ratio, 1.0) if trust_clip else ratio) * u
    return w
