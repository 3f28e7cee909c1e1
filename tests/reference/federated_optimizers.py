"""Float64 NumPy references of the server optimizers of FedOpt, one parameter at a time, from algorithm 2."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _run(
    w: Array,
    grads: Sequence[Array | None],
    lrs: Sequence[float],
    beta1: float,
    tau: float,
    second: Callable[[Array, Array], Array],
) -> Array:
    w = np.array(w, dtype=np.float64)
    m, v = np.zeros_like(w), np.full_like(w, tau**2)
    for g, lr in zip(grads, lrs, strict=True):
        if g is None:
            continue
        m = beta1 * m + (1 - beta1) * g
        v = second(v, g**2)
        w = w - lr * m / (np.sqrt(v) + tau)
    return w


def fedadam(
    w: Array,
    grads: Sequence[Array | None],
    lrs: Sequence[float],
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
) -> Array:
    """The weight after one step per gradient; a step without gradient (None) does nothing."""
    return _run(w, grads, lrs, betas[0], tau, lambda v, square: betas[1] * v + (1 - betas[1]) * square)


def fedyogi(
    w: Array,
    grads: Sequence[Array | None],
    lrs: Sequence[float],
    *,
    betas: tuple[float, float] = (0.9, 0.99),
    tau: float = 1e-3,
) -> Array:
    """The weight after one step per gradient; a step without gradient (None) does nothing."""
    return _run(w, grads, lrs, betas[0], tau, lambda v, square: v - (1 - betas[1]) * square * np.sign(v - square))


def fedadagrad(
    w: Array, grads: Sequence[Array | None], lrs: Sequence[float], *, beta1: float = 0.0, tau: float = 1e-3
) -> Array:
    """The weight after one step per gradient; a step without gradient (None) does nothing."""
    return _run(w, grads, lrs, beta1, tau, lambda v, square: v + square)
