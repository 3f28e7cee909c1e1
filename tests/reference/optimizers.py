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
        tangent = _tangent(u, w, g, delta, eps)
        if tangent is not None:
            u, decay = tangent, decay * wd_ratio
        w = w - decay * w - lr / (1 - betas[0] ** t) * u
    return w


def sgdp(
    w: Array,
    grads: Sequence[Array | None],
    lrs: Sequence[float],
    *,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    eps: float = 1e-8,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
) -> Array:
    """The weight after one step per gradient; a step without gradient (None) does nothing."""
    w = np.array(w, dtype=np.float64)
    b = np.zeros_like(w)
    for g, lr in zip(grads, lrs, strict=True):
        if g is None:
            continue
        b = momentum * b + (1 - dampening) * g
        u = g + momentum * b if nesterov else b
        decay = lr * weight_decay / (1 - momentum)
        tangent = _tangent(u, w, g, delta, eps)
        if tangent is not None:
            u, decay = tangent, decay * wd_ratio
        w = w - decay * w - lr * u
    return w


def _tangent(u: Array, w: Array, g: Array, delta: float, eps: float) -> Array | None:
    """The update without its radial part by channels, else as a whole; None if the weight is not scale-invariant."""
    if w.ndim < 2:
        return None
    for rows in (len(w), 1):
        us, ws, gs = (x.reshape(rows, -1) for x in (u, w, g))
        norms = [max(np.linalg.norm(x), eps) * max(np.linalg.norm(y), eps) for x, y in zip(gs, ws, strict=True)]
        cosines = np.abs(np.sum(gs * ws, axis=1)) / norms
        if cosines.max() < delta / np.sqrt(ws.shape[1]):
            directions = ws / (np.linalg.norm(ws, axis=1, keepdims=True) + eps)
            return (us - directions * np.sum(directions * us, axis=1, keepdims=True)).reshape(w.shape)
    return None


def adabelief(
    w: Array,
    grads: Sequence[Array | None],
    lrs: Sequence[float],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-16,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    weight_decouple: bool = True,
    fixed_decay: bool = False,
    rectify: bool = True,
    degenerated_to_sgd: bool = True,
) -> Array:
    """The weight after one step per gradient; a step without gradient (None) does nothing."""
    w = np.array(w, dtype=np.float64)
    m, s, largest, t = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w), 0
    rho_max = 2 / (1 - betas[1]) - 1
    for g, lr in zip(grads, lrs, strict=True):
        if g is None:
            continue
        t += 1
        if weight_decouple:
            w = w * (1 - (1.0 if fixed_decay else lr) * weight_decay)
        else:
            g = g + weight_decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        s = betas[1] * s + (1 - betas[1]) * (g - m) ** 2 + eps
        largest = np.maximum(largest, s)
        average, correction = m / (1 - betas[0] ** t), 1 - betas[1] ** t
        rho = rho_max - 2 * t * betas[1] ** t / correction
        if not rectify:
            w = w - lr * average / (np.sqrt((largest if amsgrad else s) / correction) + eps)
        elif rho >= 5:
            r = np.sqrt((rho - 4) * (rho - 2) * rho_max / ((rho_max - 4) * (rho_max - 2) * rho))
            w = w - lr * r * np.sqrt(correction) * average / (np.sqrt(s) + eps)
        elif degenerated_to_sgd:
            w = w - lr * average
    return w


def laprop(
    w: Array,
    grads: Sequence[Array | None],
    lrs: Sequence[float],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-15,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    centered: bool = False,
    steps_before_using_centered: int = 10,
    fixed_decay: bool = False,
    paper_momentum: bool = False,
) -> Array:
    """The weight after one step per gradient; a step without gradient (None) does nothing."""
    w = np.array(w, dtype=np.float64)
    m, v, mean, largest = (np.zeros_like(w) for _ in range(4))
    average_lr, t = 0.0, 0
    for g, lr in zip(grads, lrs, strict=True):
        if g is None:
            continue
        t += 1
        v = betas[1] * v + (1 - betas[1]) * g**2
        mean = betas[1] * mean + (1 - betas[1]) * g
        z, gathering = v, centered and t <= steps_before_using_centered
        if centered and not gathering:
            z = v - mean**2
        if amsgrad and not gathering:
            z = largest = np.maximum(largest, z)
        u = g / (np.sqrt(z / (1 - betas[1] ** t)) + eps)
        w = w * (1 - (1.0 if fixed_decay else lr) * weight_decay)
        if paper_momentum:
            m = betas[0] * m + (1 - betas[0]) * u
            w = w - lr * m / (1 - betas[0] ** t)
        else:
            m = betas[0] * m + (1 - betas[0]) * lr * u
            average_lr = betas[0] * average_lr + (1 - betas[0]) * lr
            w = w - m / (average_lr / lr)
    return w


def diffgrad(
    w: Array,
    grads: Sequence[Array | None],
    lrs: Sequence[float],
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    version: int = 0,
    original: bool = False,
) -> Array:
    """The weight after one step per gradient; a step without gradient (None) does nothing."""
    w = np.array(w, dtype=np.float64)
    m, v, previous, t = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w), 0
    for g, lr in zip(grads, lrs, strict=True):
        if g is None:
            continue
        t += 1
        g = g + weight_decay * w
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        change = np.zeros_like(g) if original and t > 1 else previous - g
        if version == 0:
            friction = 1 / (1 + np.exp(-np.abs(change)))
        elif version == 1:
            friction = 1 / (1 + np.exp(-change))
        else:
            friction = 9 / (1 + np.exp(-0.5 * np.abs(change))) - 4
        w = w - lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) * friction * m / (np.sqrt(v) + eps)
        previous = g
    return w
