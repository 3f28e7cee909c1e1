"""Float64 NumPy references of DiLoCo (Douillard et al. 2023, algorithm 1) and local SGD (Stich 2019, algorithm 1)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Gradient = Callable[[Array, int, int], Array]  # point, step, rank


class Inner:
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), or SGD without momentum, of one rank."""

    def __init__(self, kind: str, lr: float, decay: float = 0.0) -> None:
        self.kind, self.lr, self.decay = kind, lr, decay
        self.t, self.m, self.v = 0, np.zeros(()), np.zeros(())

    def step(self, x: Array, g: Array) -> Array:
        self.t += 1
        if self.kind == "sgd":
            return x - self.lr * g
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        root = np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8
        return x - self.lr * self.decay * x - self.lr * (self.m / (1 - 0.9**self.t)) / root


def diloco(
    x: Array,
    gradient: Gradient,
    workers: int,
    steps: int,
    every: int,
    inner: dict[str, Any],
    outer_lr: float = 0.7,
    momentum: float = 0.9,
    send: Callable[[Array, int], Array] = lambda differences, _: differences,
) -> list[Array]:
    """The last agreed point, then every rank's own, after so many steps.

    `send(differences [workers, ...], round)` is what arrives of each difference. Nesterov's momentum as in the papers
    on deep learning: v <- momentum v + g, x <- x - lr (g + momentum v).
    """
    agreed, v = x, np.zeros_like(x)
    local = [x] * workers
    inners = [Inner(**inner) for _ in range(workers)]
    for step in range(steps):
        local = [inners[i].step(local[i], gradient(local[i], step, i)) for i in range(workers)]
        if (step + 1) % every == 0:
            pseudo_gradient = send(np.stack([agreed - y for y in local]), step // every).mean(axis=0)
            v = momentum * v + pseudo_gradient
            agreed = agreed - outer_lr * (pseudo_gradient + momentum * v)
            local = [agreed] * workers
    return [agreed, *local]


def local_sgd(x: Array, gradient: Gradient, workers: int, steps: int, every: int, inner: dict[str, Any]) -> list[Array]:
    """The same where every exchange replaces parameters by their mean."""
    agreed, local = x, [x] * workers
    inners = [Inner(**inner) for _ in range(workers)]
    for step in range(steps):
        local = [inners[i].step(local[i], gradient(local[i], step, i)) for i in range(workers)]
        if (step + 1) % every == 0:
            agreed = np.mean(local, axis=0)
            local = [agreed] * workers
    return [agreed, *local]


class ChunkTopKTernary:
    """SparseLoCo's path of a difference: a decayed residual, the k largest of each chunk, and three levels of them."""

    def __init__(self, workers: int, k: int, chunk: int, decay: float) -> None:
        self.k, self.chunk, self.decay = k, chunk, decay
        self.residuals: list[Array | float] = [0.0] * workers

    def __call__(self, differences: Array, _: int) -> Array:
        sent = []
        for i, difference in enumerate(differences):
            target = difference + self.decay * self.residuals[i]
            sent.append(self._compress(target))
            self.residuals[i] = target - sent[-1]
        return np.stack(sent)

    def _compress(self, x: Array) -> Array:
        flat = x.reshape(-1)
        out = np.zeros_like(flat)
        for start in range(0, flat.size, self.chunk):
            chunk = flat[start : start + self.chunk]
            kept = np.argsort(-np.abs(chunk), kind="stable")[: self.k]
            scale = np.abs(chunk).max()
            out[start + kept] = scale * np.rint(chunk[kept] / scale)
        return out.reshape(x.shape)
