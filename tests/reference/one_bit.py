"""Float64 NumPy references of 1-bit Adam, 1-bit LAMB and 0/1 Adam: one tensor, n workers, error feedback twice."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def signs(x: Array, width: int) -> Array:
    """Every row of `width` entries, the last one with zeros behind it, as its signs times its mean magnitude."""
    rows = np.zeros((-(-x.size // width), width))
    rows.ravel()[: x.size] = x.ravel()
    scale = np.abs(rows).mean(axis=1, keepdims=True).astype(np.float32)
    return (np.where(rows >= 0, 1.0, -1.0) * scale).ravel()[: x.size].reshape(x.shape)


class OneBitMean:
    """The mean of what n workers send in one bit per entry, itself sent so; all losses are kept and added next time."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.errors: Any = 0.0
        self.server_error: Any = 0.0

    def __call__(self, values: Array) -> Array:
        """Of `[n, ...]`."""
        targets = values + self.errors
        sent = np.stack([signs(target, self.width) for target in targets])
        self.errors = targets - sent
        target = sent.mean(axis=0) + self.server_error
        mean = signs(target, self.width)
        self.server_error = target - mean
        return mean


def one_bit_adam(
    w: Array,
    grads: Sequence[Array],
    lrs: Sequence[float],
    *,
    warmup_steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    width: int = 1024,
    **_: Any,
) -> Array:
    """The weight after one step per `[n, ...]` of gradients."""
    mean = OneBitMean(width)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), 1):
        if t <= warmup_steps:
            m = betas[0] * m + (1 - betas[0]) * g.mean(axis=0)
            v = betas[1] * v + (1 - betas[1]) * g.mean(axis=0) ** 2
        else:
            m = np.where(v > 0, mean(betas[0] * m + (1 - betas[0]) * g), 0.0)
        first, second = _corrections(betas, t, min(t, warmup_steps), bias_correction)
        w = (1 - lr * weight_decay) * w - lr * (m / first) / (np.sqrt(v / second) + eps)
    return w


def one_bit_lamb(
    w: Array,
    grads: Sequence[Array],
    lrs: Sequence[float],
    *,
    warmup_steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.0,
    beta3: float = 0.9,
    ratio_bounds: tuple[float, float] = (0.01, 10.0),
    factor_bounds: tuple[float, float] = (0.5, 4.0),
    threshold: float = 0.1,
    bias_correction: bool = True,
    width: int = 1024,
    **_: Any,
) -> Array:
    """The weight after one step per `[n, ...]` of gradients."""
    mean = OneBitMean(width)
    m, v, fresh = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w)
    average, factor = 0.0, 1.0
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True), 1):
        first, second = _corrections(betas, t, min(t, warmup_steps), bias_correction)
        if t <= warmup_steps:
            m = betas[0] * m + (1 - betas[0]) * g.mean(axis=0)
            v = betas[1] * v + (1 - betas[1]) * g.mean(axis=0) ** 2
            fresh = v
        else:
            last, m = m, np.where(v > 0, mean(betas[0] * m + (1 - betas[0]) * g), 0.0)
            rebuilt = (m - betas[0] * last) / (1 - betas[0])
            fresh = betas[1] * fresh + (1 - betas[1]) * rebuilt**2
        u = (m / first) / (np.sqrt(v / second) + eps) + weight_decay * w
        if t <= warmup_steps:
            ratio = 1.0
            if np.any(w) and np.any(u):
                ratio = float(np.clip(np.linalg.norm(w.ravel()) / np.linalg.norm(u.ravel()), *ratio_bounds))
            average = beta3 * average + (1 - beta3) * ratio
        else:
            now = _corrections(betas, t, t, bias_correction)[1]
            ratios = (np.sqrt(v / second) + eps) / (np.sqrt(fresh / now) + eps)
            wanted = np.clip(ratios[v > 0].max(), *factor_bounds)
            factor = float(np.clip(wanted, factor * (1 - threshold), factor * (1 + threshold)))
            ratio = factor * average / (1 - beta3**warmup_steps if bias_correction else 1.0)
        w = w - lr * ratio * u
    return w


def zero_one_adam(
    w: Array,
    grads: Sequence[Array],
    lrs: Sequence[float],
    *,
    warmup_steps: int,
    kappa: int = 16,
    double_every: int = 32768,
    max_interval: int = 16,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    bias_correction: bool = True,
    width: int = 1024,
    **_: Any,
) -> Array:
    """The weight of worker 0 after one step per `[n, ...]` of gradients."""
    n, mean = len(grads[0]), OneBitMean(width)
    dense, exchanged = zero_one_policies(len(grads), warmup_steps, kappa, double_every, max_interval)
    start, v = np.array(w), np.zeros_like(w)
    x, m, u = (np.stack([value] * n) for value in (start, v, v))
    rates, updates = 0.0, 0
    for t, (g, lr) in enumerate(zip(grads, lrs, strict=True)):
        rate = lr / (1 - betas[0] ** (t + 1)) if bias_correction else lr
        keep = 1 - lr * weight_decay
        m = betas[0] * m + (1 - betas[0]) * g
        if t in dense:
            v = betas[1] * v + (1 - betas[1]) * g.mean(axis=0) ** 2
            m = np.stack([m.mean(axis=0)] * n)
            updates += 1
        root = np.sqrt(v / (1 - betas[1] ** updates) if bias_correction else v) + eps
        start, known = keep * start, v > 0
        x = np.where(known, keep * x - rate * m / root, keep * x)
        u, rates = u + np.where(known, rate * m, 0.0), rates + rate
        if t in exchanged:
            common = np.where(known, mean(u), 0.0)
            m = np.stack([common / rates] * n)
            x = np.stack([start - common / root] * n)
        if t in dense or t in exchanged:
            start, u, rates = x[0], np.zeros_like(u), 0.0
    return x[0]


def zero_one_policies(
    steps: int, warmup_steps: int, kappa: int, double_every: int, max_interval: int
) -> tuple[set[int], set[int]]:
    """The steps whose gradients are averaged, and those in which accumulated steps are exchanged."""
    dense, exchanged, t = set(), set(), 0
    for j in range(steps):
        if t < warmup_steps:
            dense.add(t)
        t += 2 ** (j // kappa)
    interval, waited = 1, 0
    for t in range(steps):
        if t < warmup_steps:
            exchanged |= {t} - dense
            continue
        waited += 1
        ends = (t - warmup_steps + 1) % double_every == 0
        if waited == interval or ends:
            exchanged.add(t)
            waited = 0
        if ends:
            interval = min(2 * interval, max_interval)
    return dense, exchanged


def _corrections(betas: tuple[float, float], first: int, second: int, correct: bool) -> tuple[float, float]:
    return (1 - betas[0] ** first, 1 - betas[1] ** second) if correct else (1.0, 1.0)
