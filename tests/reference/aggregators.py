"""Float64 NumPy references of aggregators, message by message, from the papers; and of Fisher-weighted averaging.

An aggregator is `(messages [n, d], weights [n]) -> [d]`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from reference.federated import Run

Array = NDArray[np.float64]
Rule = Callable[[Array, Array], Array]


def weighted_mean(messages: Array, weights: Array) -> Array:
    return np.average(messages, axis=0, weights=weights)


def mean_by_entry(messages: Array, weights: Array) -> Array:
    """Weights `[n]` or `[n, d]`; where all are zero, zero."""
    weights = np.broadcast_to(weights.reshape(len(messages), -1), messages.shape)
    result = np.zeros(messages.shape[1])
    for j in range(messages.shape[1]):
        if weights[:, j].sum() > 0:
            result[j] = weights[:, j] @ messages[:, j] / weights[:, j].sum()
    return result


def coordinate_median(messages: Array, weights: Array) -> Array:
    result: Array = np.median(messages, axis=0)
    return result


def trimmed_mean(messages: Array, weights: Array, beta: float) -> Array:
    k = int(beta * len(messages))
    result: Array = np.sort(messages, axis=0)[k : len(messages) - k].mean(axis=0)
    return result


def krum_scores(messages: Sequence[Array], f: int, least: int = 1) -> list[float]:
    near = max(least, len(messages) - f - 2)
    scores = []
    for i, m in enumerate(messages):
        distances = sorted(float(((m - other) ** 2).sum()) for j, other in enumerate(messages) if j != i)
        scores.append(sum(distances[:near]))
    return scores


def krum(messages: Array, weights: Array, f: int) -> Array:
    best: Array = messages[int(np.argmin(krum_scores(list(messages), f)))]
    return best


def multi_krum(messages: Array, weights: Array, f: int, m: int | None = None) -> Array:
    order = np.argsort(krum_scores(list(messages), f), kind="stable")
    result: Array = messages[order[: len(messages) - f if m is None else m]].mean(axis=0)
    return result


def bulyan(messages: Array, weights: Array, f: int) -> Array:
    left, chosen = list(messages), []
    while len(chosen) < len(messages) - 2 * f:
        chosen.append(left.pop(int(np.argmin(krum_scores(left, f, least=2)))))
    values = np.array(chosen)
    result = np.zeros(messages.shape[1])
    for j, column in enumerate(values.T):
        nearest = np.argsort(np.abs(column - np.median(column)), kind="stable")
        result[j] = column[nearest[: len(column) - 2 * f]].mean()
    return result


def geometric_median(messages: Array, weights: Array, iterations: int, nu: float = 1e-6) -> Array:
    alphas = weights / weights.sum()
    v: Array = alphas @ messages
    for _ in range(iterations):
        betas = np.array([a / max(nu, float(np.linalg.norm(m - v))) for a, m in zip(alphas, messages, strict=True)])
        v = (betas[:, None] * messages).sum(axis=0) / betas.sum()
    return v


def norm_clipping(messages: Array, weights: Array, max_norm: float, then: Rule = weighted_mean) -> Array:
    norms = np.linalg.norm(messages, axis=1, keepdims=True)
    return then(messages * np.minimum(1.0, max_norm / norms), weights)


def centered_clipping(messages: Array, weights: Array, tau: float, iterations: int, v: Array | None = None) -> Array:
    v = np.zeros(messages.shape[1]) if v is None else v
    alphas = weights / weights.sum()
    for _ in range(iterations):
        steps = [(m - v) * min(1.0, tau / float(np.linalg.norm(m - v))) for m in messages]
        v = v + sum(a * step for a, step in zip(alphas, steps, strict=True))
    return v


def bucketing(messages: Array, weights: Array, s: int, then: Rule, order: Callable[[int], Sequence[int]]) -> Array:
    shuffled = messages[list(order(len(messages)))]
    buckets = np.array([shuffled[first : first + s].mean(axis=0) for first in range(0, len(shuffled), s)])
    return then(buckets, np.ones(len(buckets)))


def ties(messages: Array, weights: Array, density: float, lamb: float = 1.0) -> Array:
    kept = messages.copy()
    k = max(1, int(np.ceil(density * messages.shape[1])))
    for row in kept:
        row[np.abs(row) < np.sort(np.abs(row))[-k]] = 0.0
    signs = np.sign(weights @ kept)
    signs[signs == 0] = np.sign(signs.sum())
    result = np.zeros(messages.shape[1])
    for j, sign in enumerate(signs):
        agree = np.sign(kept[:, j]) == sign
        if sign and agree.any():
            result[j] = lamb * np.average(kept[agree, j], weights=weights[agree])
    return result


def fisher_averaging(run: Run, exact: bool, normalize: bool = False, floor: float = 0.0) -> Iterator[Array]:
    """x after every round. On quadratics, labels are Gaussian with means sqrt(a) y: F is the mean of a if exact."""
    x = run.start
    for r, cohort in enumerate(run.cohorts):
        ends, fishers = [], []
        for i in cohort:
            y: Any = run.train(r, i, x)[0]
            rows = run.a[i] if exact else (run.a[i] * (y - run.b[i])) ** 2
            fisher = rows.mean(axis=0)
            ends.append(y)
            fishers.append(fisher / np.linalg.norm(fisher) if normalize else fisher)
        weighted = run.shares(cohort)[:, None] * np.array(fishers)
        merged = (floor * x + (weighted * np.array(ends)).sum(axis=0)) / (floor + weighted.sum(axis=0))
        x = x + run.server_lr * (merged - x)
        yield x
