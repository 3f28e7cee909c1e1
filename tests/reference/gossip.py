"""Float64 NumPy reference of CHOCO-Gossip, written from the paper's algorithm 1."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def metropolis(edges: list[tuple[int, int]], nodes: int) -> Array:
    """Xiao, Boyd, Kim (2007): 1 / (1 + the larger degree) on edges, the rest on the diagonal."""
    degree = [sum(node in edge for edge in edges) for node in range(nodes)]
    weights = np.zeros((nodes, nodes))
    for i, j in edges:
        weights[i, j] = weights[j, i] = 1 / (1 + max(degree[i], degree[j]))
    return weights + np.diag(1 - weights.sum(axis=1))


def choco(
    x: Array, weights: Array, compress: Callable[[Array], Array], gamma: float, steps: int
) -> tuple[Array, Array]:
    """Every agent's x after each step, and the x-hat that its neighbours know: `[steps, n, d]` both."""
    agents = len(x)
    x = x.copy()
    public = np.zeros_like(x)
    states, known = [], []
    for _ in range(steps):
        sent = [compress(x[i] - public[i]) for i in range(agents)]
        for i in range(agents):
            public[i] = public[i] + sent[i]
        for i in range(agents):
            x[i] = x[i] + gamma * sum(weights[i, j] * (public[j] - public[i]) for j in range(agents))
        states.append(x.copy())
        known.append(public.copy())
    return np.stack(states), np.stack(known)
