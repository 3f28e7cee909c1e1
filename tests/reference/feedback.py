"""Float64 NumPy references of error feedback for n workers, written from the papers' algorithms.

Each takes the gradients `[steps, n, rows, width]` and the compressor as a function on `[rows, width]`, and gives the
gradient estimate of every step `[steps, rows, width]` and the workers' last state by name.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Map = Callable[[Array], Array]


def none(grads: Array, compress: Map) -> tuple[Array, dict[str, Array]]:
    """Distributed SGD with compressed gradients (Alistarh et al. 2017, algorithm 1)."""
    return np.stack([np.mean([compress(g) for g in step], axis=0) for step in grads]), {}


def ef(grads: Array, compress: Map, decay: float = 1.0) -> tuple[Array, dict[str, Array]]:
    """EF-SGD with n workers (Karimireddy et al. 2019, algorithm 2), in gradient units."""
    error = np.zeros_like(grads[0])
    estimates = []
    for step in grads:
        sent = np.zeros_like(error)
        for i, g in enumerate(step):
            p = g + decay * error[i]
            sent[i] = compress(p)
            error[i] = p - sent[i]
        estimates.append(sent.mean(axis=0))
    return np.stack(estimates), {"residual": error}


def ef21(grads: Array, compress: Map) -> tuple[Array, dict[str, Array]]:
    """EF21 with n workers (Richtarik et al. 2021, algorithm 2) and g_i^0 = 0; the master's g is the mean of all g_i."""
    tracked = np.zeros_like(grads[0])
    estimates = []
    for step in grads:
        for i, g in enumerate(step):
            tracked[i] = tracked[i] + compress(g - tracked[i])
        estimates.append(tracked.mean(axis=0))
    return np.stack(estimates), {"local": tracked, "mean": tracked.mean(axis=0, keepdims=True)}


def decoupled_momentum(
    grads: Array, compress: Map, decay: float, alpha: float = 1.0, ema: bool = False
) -> tuple[Array, dict[str, Array]]:
    """DeMo's momentum with n workers (Peng et al. 2024, algorithm 1), with alpha and average of its second version."""
    momentum = np.zeros_like(grads[0])
    estimates = []
    for step in grads:
        sent = np.zeros_like(momentum)
        for i, g in enumerate(step):
            momentum[i] = decay * momentum[i] + (1 - decay if ema else 1) * g
            sent[i] = compress(momentum[i])
            momentum[i] = momentum[i] - alpha * sent[i]
        estimates.append(sent.mean(axis=0))
    return np.stack(estimates), {"momentum_buffer": momentum}
