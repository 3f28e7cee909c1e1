"""Float64 NumPy references of the optimizers, one parameter at a time, written from the papers' equations."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def adamp(
    w: Array,
    grads: Sequence[Array | None],
    lrs: Sequence[float],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
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
        numerator = betas[0] * m + (1 - betas[0]) * g if nesterov else m
        u = numerator / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
        decay = lr * weight_decay
        for view in _channels, _layer:
            if w.ndim > 1 and _cosines(view(g), view(w), eps).max() < delta / np.sqrt(view(w).shape[1]):
                u = np.concatenate([_tangent(*row, eps) for row in zip(view(u), view(w), strict=True)]).reshape(w.shape)
                decay *= wd_ratio
                break
        w = w - decay * w - lr / (1 - betas[0] ** t) * u
    return w


def _channels(x: Array) -> Array:
    return x.reshape(len(x), -1)


def _layer(x: Array) -> Array:
    return x.reshape(1, -1)


def _cosines(a: Array, b: Array, eps: float) -> Array:
    norms = [max(np.linalg.norm(x), eps) * max(np.linalg.norm(y), eps) for x, y in zip(a, b, strict=True)]
    return np.abs(np.einsum("rc,rc->r", a, b)) / np.array(norms)


def _tangent(u: Array, w: Array, eps: float) -> Array:
    direction = w / (np.linalg.norm(w) + eps)
    return u - direction * (direction @ u)
