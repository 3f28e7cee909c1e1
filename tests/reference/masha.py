"""Float64 NumPy references of MASHA1 and MASHA2 (Beznosikov et al. 2022, algorithms 1 and 2) for M workers.

Both take and return flat vectors z [d], and operators as functions `(z, step) -> [M, d]`; w moves at the end of a step,
as in the paper.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Operator = Callable[[Array, int], Array]


def coin(seed: int, step: int, tau: float) -> bool:
    """Whether w moves after this step, counted from 1: if a hash of seed and step, in [0, 1), is below 1 - tau."""
    digest = hashlib.blake2b(repr((seed, "snapshot", step)).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 2) / 2**62 < 1 - tau


def masha1(
    z: Array,
    sample: Operator,
    full: Operator,
    lr: Array | float,
    tau: float,
    moves: Sequence[bool],
    send: Callable[[Array, int], Array],
    prox: Callable[[Array], Array] = lambda z: z,
) -> list[Array]:
    """All iterates; `send(differences [M, d], step)` gives the mean of what the workers' compressors make of them."""
    w, iterates = z, [z]
    at_w = full(w, 0).mean(axis=0)
    for step, move in enumerate(moves):
        half = prox(tau * z + (1 - tau) * w - lr * at_w)
        u = send(sample(half, step) - sample(w, step), step)
        z = prox(tau * z + (1 - tau) * w - lr * at_w - lr * u)
        if move:
            w = z
            at_w = full(w, step + 1).mean(axis=0)
        iterates.append(z)
    return iterates


def masha2(
    z: Array,
    sample: Operator,
    full: Operator,
    lr: Array | float,
    tau: float,
    moves: Sequence[bool],
    compress: Callable[[Array], Array],
    second: Callable[[Array], Array] = lambda p: p,
) -> list[Array]:
    """All iterates; `compress` and `second` are maps on one vector, of the workers and of the server."""
    w, iterates = z, [z]
    at_w = full(w, 0).mean(axis=0)
    residuals = np.zeros_like(full(w, 0))
    servers = np.zeros_like(z)
    for step, move in enumerate(moves):
        half = tau * z + (1 - tau) * w - lr * at_w
        sent = np.zeros_like(residuals)
        for m, difference in enumerate(sample(half, step) - sample(w, step)):
            p = lr * difference + residuals[m]
            sent[m] = compress(p)
            residuals[m] = p - sent[m]
        p = sent.mean(axis=0) + servers
        g = second(p)
        servers = p - g
        z = half - g
        if move:
            w = z
            at_w = full(w, step + 1).mean(axis=0)
        iterates.append(z)
    return iterates
