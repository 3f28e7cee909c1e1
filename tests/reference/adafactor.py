"""Float64 NumPy reference of Adafactor, written from algorithms 4 and 5 of the paper and its sections 7 to 9."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def adafactor(
    w: Array,
    grads: Sequence[Array | None],
    lrs: Sequence[float],
    *,
    beta2_decay: float = -0.8,
    eps: tuple[float | None, float] = (1e-30, 1e-3),
    d: float | None = 1.0,
    weight_decay: float = 0.0,
    beta1: float | None = None,
    beta2_cap: float | None = None,
    step_offset: int = 0,
    relative_step: bool = True,
    warmup_init: bool = False,
    scale_parameter: bool = True,
    min_dim_size_to_factor: int = 0,
    factored_dims: str = "last",
    decay: str = "lr",
) -> Array:
    """The weight after one step per gradient; a step without gradient (None) does nothing."""
    w = np.array(w, dtype=np.float64)
    axes = _axes(w.shape, factored_dims, min_dim_size_to_factor)
    r, c, v, m, t = 0.0, 0.0, 0.0, np.zeros_like(w), 0
    for g, lr in zip(grads, lrs, strict=True):
        if g is None:
            continue
        t += 1
        rho = lr
        if relative_step:
            rho = min(lr, 1e-6 * t if warmup_init else lr, 1 / np.sqrt(t))
        alpha = rho * (max(eps[1], _rms(w)) if scale_parameter else 1.0)
        beta2 = 1 - float(max(1, t - step_offset)) ** beta2_decay
        if beta2_cap is not None:
            beta2 = min(beta2, beta2_cap)

        squared = g**2 + (1e-30 if eps[0] is None else eps[0])
        if axes is None:
            v = beta2 * v + (1 - beta2) * squared
            u = g / np.sqrt(v)
        else:
            row, column = axes
            r = beta2 * r + (1 - beta2) * squared.sum(column, keepdims=True)
            c = beta2 * c + (1 - beta2) * squared.sum(row, keepdims=True)
            u = g / np.sqrt(r * c / np.sum(r, axis=row, keepdims=True))
        if d is not None:
            u = u / max(1.0, _rms(u) / d)

        m = (beta1 or 0.0) * m + (1 - (beta1 or 0.0)) * alpha * u
        w = w - (lr if decay == "lr" else alpha) * weight_decay * w - m
    return w


def _axes(shape: tuple[int, ...], which: str, min_size: int) -> tuple[int, int] | None:
    if len(shape) < 2:
        return None
    pair = (len(shape) - 2, len(shape) - 1) if which == "last" else tuple(np.argsort(shape, kind="stable")[-2:])
    return (int(pair[0]), int(pair[1])) if min(shape[a] for a in pair) >= min_size else None


def _rms(x: Array) -> float:
    return float(np.sqrt(np.mean(x**2)))
