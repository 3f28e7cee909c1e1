"""Float64 NumPy reference of PowerSGD for n workers, written from the paper's algorithms 1 and 2."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def gram_schmidt(p: Array) -> Array:
    """Orthonormal columns, one after another."""
    columns: list[Array] = []
    for column in p.T:
        for other in columns:
            column = column - (other @ column) * other
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, axis=1)


def powersgd(grads: Array, q: Array) -> tuple[Array, Array, Array]:
    """Rank-r PowerSGD with error feedback and warm start.

    Takes gradients `[steps, n, m, k]` and the first Q `[k, r]`; gives the mean updates `[steps, m, k]`, the workers'
    last errors `[n, m, k]` and the last Q.
    """
    error = np.zeros_like(grads[0])
    updates = []
    for step in grads:
        delta = step + error
        p = gram_schmidt(np.mean([d @ q for d in delta], axis=0))
        own = [d.T @ p for d in delta]
        q = np.mean(own, axis=0)
        updates.append(p @ q.T)
        error = np.stack([d - p @ q_i.T for d, q_i in zip(delta, own, strict=True)])
    return np.stack(updates), error, q
