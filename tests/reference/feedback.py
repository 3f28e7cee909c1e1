"""Float64 NumPy references of error feedback for n workers, written from the papers' algorithms.

Each takes the gradients `[steps, n, rows, width]` and the compressor as a function on `[rows, width]` (that of an
unbiased one takes the step, too, in which its draws are fixed), and gives the gradient estimate of every step
`[steps, rows, width]` and the workers' last state by name.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Map = Callable[[Array], Array]
RandomMap = Callable[[Array, int], Array]


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


def ef21(grads: Array, compress: Map, dense_start: bool = False) -> tuple[Array, dict[str, Array]]:
    """EF21 with n workers (Richtarik et al. 2021, algorithm 2) and g_i^0 = 0 or the first gradient; the master's g is
    the mean of all g_i."""
    tracked = grads[0].copy() if dense_start else np.zeros_like(grads[0])
    estimates = []
    for step in grads:
        for i, g in enumerate(step):
            tracked[i] = tracked[i] + compress(g - tracked[i])
        estimates.append(tracked.mean(axis=0))
    return np.stack(estimates), {"local": tracked, "mean": tracked.mean(axis=0, keepdims=True)}


def ef21_w(
    grads: Array, compress: Map, smoothness: Sequence[float], dense_start: bool = False
) -> tuple[Array, dict[str, Array]]:
    """EF21-W (Richtarik et al. 2024, algorithm 2): worker i tracks g_i / (n w_i), and w_i weights it on the server."""
    n = len(smoothness)
    w = np.array(smoothness) / np.sum(smoothness)
    scale = (1 / (n * w))[:, None, None]
    tracked = scale * grads[0] if dense_start else np.zeros_like(grads[0])
    estimates = []
    for step in grads:
        for i in range(n):
            tracked[i] += compress(step[i] / (n * w[i]) - tracked[i])
        estimates.append(np.tensordot(w, tracked, axes=1))
    return np.stack(estimates), {"local": tracked, "mean": estimates[-1][None]}


def ef21_sgdm(grads: Array, compress: Map, eta: float, dense_start: bool = False) -> tuple[Array, dict[str, Array]]:
    """EF21-SGDM (Fatkhullin et al. 2023, algorithm 1)."""
    momentum = grads[0].copy() if dense_start else np.zeros_like(grads[0])
    tracked = momentum.copy()
    estimates = []
    for step in grads:
        momentum = (1 - eta) * momentum + eta * step
        tracked = tracked + np.stack([compress(v - g) for v, g in zip(momentum, tracked, strict=True)])
        estimates.append(tracked.mean(axis=0))
    return np.stack(estimates), {"exp_avg": momentum, "local": tracked, "mean": tracked.mean(axis=0, keepdims=True)}


def econtrol(grads: Array, compress: Map, eta: float, dense_start: bool = False) -> tuple[Array, dict[str, Array]]:
    """EControl (Gao et al. 2024, algorithm 2); the server's h is the mean of all h_i."""
    error, tracked = np.zeros_like(grads[0]), grads[0].copy() if dense_start else np.zeros_like(grads[0])
    estimates = []
    for step in grads:
        for i, g in enumerate(step):
            delta = compress(eta * error[i] + g - tracked[i])
            error[i] = error[i] + g - tracked[i] - delta
            tracked[i] = tracked[i] + delta
        estimates.append(tracked.mean(axis=0))
    return np.stack(estimates), {"residual": error, "local": tracked, "mean": tracked.mean(axis=0, keepdims=True)}


def diana(grads: Array, compress: RandomMap, rate: float) -> tuple[Array, dict[str, Array]]:
    """DIANA (Mishchenko et al. 2019, algorithm 1), with h_i^0 = 0 and without its momentum and proximal step."""
    memory = np.zeros_like(grads[0])
    estimates = []
    for t, step in enumerate(grads):
        sent = np.stack([compress(g - h, t) for g, h in zip(step, memory, strict=True)])
        estimates.append((memory + sent).mean(axis=0))
        memory = memory + rate * sent
    return np.stack(estimates), {"local": memory, "mean": memory.mean(axis=0, keepdims=True)}


def marina(grads: Array, compress: RandomMap, dense: Collection[int]) -> tuple[Array, dict[str, Array]]:
    """MARINA (Gorbunov et al. 2021, algorithm 1); `dense` are the steps in which the coin showed 1."""
    estimate = np.zeros_like(grads[0][0])
    estimates = []
    for t, step in enumerate(grads):
        if t in dense:
            estimate = step.mean(axis=0)
        else:
            estimate = estimate + np.mean([compress(g - old, t) for g, old in zip(step, grads[t - 1], strict=True)], 0)
        estimates.append(estimate)
    return np.stack(estimates), {"previous": grads[-1], "mean": estimate[None]}


def ef21_bc(grads: Array, compress: Map, second: Map) -> Array:
    """EF21-BC (Fatkhullin et al. 2021, algorithm 5), all states zero at the start; returns the estimates alone."""
    tracked = np.zeros_like(grads[0])
    estimate = np.zeros_like(grads[0][0])
    estimates = []
    for step in grads:
        tracked = tracked + np.stack([compress(g - h) for g, h in zip(step, tracked, strict=True)])
        estimate = estimate + second(tracked.mean(axis=0) - estimate)
        estimates.append(estimate)
    return np.stack(estimates)


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
