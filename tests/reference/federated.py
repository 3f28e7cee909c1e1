"""Float64 NumPy references of federated algorithms: whole runs on quadratics, client by client, from the papers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _lossless(round: int, client: int, vector: Array) -> Array:
    return vector


@dataclass(frozen=True)
class Run:
    """Clients with f_i(x) = mean over rows j of 1/2 (x - b_ij)^T diag(a_ij) (x - b_ij), and what happens to them.

    Args:
        a: Curvatures of every client, `[rows, d]`.
        b: Minima, likewise.
        weights: p_i of every client.
        cohorts: Clients of every round.
        steps: Of (round, client).
        lr: Of a round.
        start: x at first.
        server_lr: Factor of the server's step.
        momentum: Of local SGD.
        compress: Of (round, client, vector), what arrives.
    """

    a: Sequence[Array]
    b: Sequence[Array]
    weights: Sequence[float]
    cohorts: Sequence[Sequence[int]]
    steps: Callable[[int, int], int]
    lr: Callable[[int], float]
    start: Array
    server_lr: float = 1.0
    momentum: float = 0.0
    compress: Callable[[int, int, Array], Array] = _lossless

    def gradient(self, client: int, y: Array) -> Array:
        gradient: Array = (self.a[client] * (y - self.b[client])).mean(axis=0)
        return gradient

    def train(
        self, round: int, client: int, x: Array, extra: Callable[[Array], Array] | None = None
    ) -> tuple[Array, list[Array]]:
        """What a client ends at, with `extra(y)` added to every gradient, and its raw gradients."""
        y, velocity, raw = x.copy(), np.zeros_like(x), []
        for _ in range(self.steps(round, client)):
            raw.append(self.gradient(client, y))
            velocity = self.momentum * velocity + raw[-1] + (0.0 if extra is None else extra(y))
            y = y - self.lr(round) * velocity
        return y, raw

    def shares(self, cohort: Sequence[int]) -> Array:
        """p_i of the cohort, normalised."""
        p = np.array([self.weights[i] for i in cohort])
        return p / p.sum()


def _mean(shares: Array, values: Sequence[Any]) -> Any:
    return sum(p * value for p, value in zip(shares, values, strict=True))


def fedavg(run: Run, mu: float = 0.0) -> Iterator[Array]:
    """x after every round; with mu, FedProx."""
    x = run.start
    for r, cohort in enumerate(run.cohorts):
        ends = [run.train(r, i, x, lambda y, x=x: mu * (y - x))[0] for i in cohort]
        x = (1 - run.server_lr) * x + run.server_lr * _mean(run.shares(cohort), ends)
        yield x


def feedback_fedavg(run: Run, track: bool) -> Iterator[Array]:
    """FedAvg with compressed messages: EF14, or EF21 (absent clients unchanged)."""
    x = run.start
    memory = np.zeros((len(run.weights), x.size))
    estimate = np.zeros_like(x)
    for r, cohort in enumerate(run.cohorts):
        arrived = []
        for i in cohort:
            movement = x - run.train(r, i, x)[0]
            arrived.append(run.compress(r, i, movement - memory[i] if track else movement + memory[i]))
            memory[i] = memory[i] + arrived[-1] if track else movement + memory[i] - arrived[-1]
        if track:
            estimate = estimate + sum(arrived) / len(run.weights)
        x = x - run.server_lr * (estimate if track else _mean(run.shares(cohort), arrived))
        yield x


def scaffold(run: Run, option: str = "II") -> Iterator[Array]:
    """Algorithm 1; the server's control variate is the p-weighted mean of clients'. With momentum, of raw gradients."""
    x, c = run.start, np.zeros_like(run.start)
    controls = np.zeros((len(run.weights), x.size))
    p = np.array(run.weights) / sum(run.weights)
    for r, cohort in enumerate(run.cohorts):
        ends, changes = [], np.zeros_like(controls)
        for i in cohort:
            y, raw = run.train(r, i, x, lambda _, c=c, own=controls[i]: c - own)
            new = run.gradient(i, x) if option == "I" else np.mean(raw, axis=0)
            if option == "II" and not run.momentum:
                textbook = controls[i] - c + (x - y) / (run.steps(r, i) * run.lr(r))
                np.testing.assert_allclose(new, textbook, rtol=0, atol=1e-12)
            changes[i] = new - controls[i]
            ends.append(y)
        x = x + run.server_lr * (_mean(run.shares(cohort), ends) - x)
        controls = controls + changes
        c = c + p @ changes
        yield x


def fednova(run: Run, mu: float = 0.0) -> Iterator[Array]:
    """Section 4, with each client's raw gradients and the vector of their weights."""
    x = run.start
    for r, cohort in enumerate(run.cohorts):
        lr, directions, taus = run.lr(r), [], []
        for i in cohort:
            y, raw = run.train(r, i, x, lambda y, x=x: mu * (y - x))
            left = np.arange(len(raw))[::-1]
            a = (1 - run.momentum ** (left + 1)) / (1 - run.momentum) if run.momentum else (1 - lr * mu) ** left
            np.testing.assert_allclose(x - y, lr * (a @ np.array(raw)), rtol=0, atol=1e-12)
            directions.append(a @ np.array(raw) / a.sum())
            taus.append(len(raw) if mu else a.sum())
        shares = run.shares(cohort)
        x = x - run.server_lr * _mean(shares, taus) * lr * _mean(shares, directions)
        yield x


def feddyn(run: Run, alpha: float, max_norm: float = np.inf) -> Iterator[Array]:
    """Algorithm 1."""
    x, h = run.start, np.zeros_like(run.start)
    own = np.zeros((len(run.weights), x.size))
    p = np.array(run.weights) / sum(run.weights)
    for r, cohort in enumerate(run.cohorts):
        ends = []
        for i in cohort:
            ends.append(run.train(r, i, x, lambda y, x=x, h_i=own[i]: alpha * (y - x) - h_i)[0])
            own[i] = own[i] - alpha * (ends[-1] - x)
            h = h - alpha * p[i] * (ends[-1] - x)
        h = h * min(1.0, max_norm / np.linalg.norm(h))
        x = _mean(run.shares(cohort), ends) - h / alpha
        yield x


def scallion(run: Run, alpha: float, damped: bool = True) -> Iterator[Array]:
    """SCALLION; `run.compress` is unbiased."""
    return _controlled(run, lambda i, gradient, c_i: alpha * (gradient - c_i), 1.0 if damped else 1 / alpha)


def scafcom(run: Run, beta: float) -> Iterator[Array]:
    """SCAFCOM; `run.compress` contracts."""
    momenta = np.zeros((len(run.weights), run.start.size))

    def target(i: int, gradient: Array, c_i: Array) -> Array:
        momenta[i] = (1 - beta) * momenta[i] + beta * gradient
        return momenta[i] - c_i

    return _controlled(run, target, 1.0)


def _controlled(run: Run, target: Callable[[int, Array, Array], Array], gain: float) -> Iterator[Array]:
    """Control variates that move by what arrives of `target(client, mean gradient, c_i)`."""
    x, c = run.start, np.zeros_like(run.start)
    controls = np.zeros((len(run.weights), x.size))
    p = np.array(run.weights) / sum(run.weights)
    for r, cohort in enumerate(run.cohorts):
        arrived = {}
        for i in cohort:
            _, raw = run.train(r, i, x, lambda _, c=c, own=controls[i]: c - own)
            arrived[i] = run.compress(r, i, target(i, np.mean(raw, axis=0), controls[i]))
            controls[i] = controls[i] + arrived[i]
        shares = run.shares(cohort)
        movement = run.lr(r) * _mean(shares, [run.steps(r, i) for i in cohort])
        x = x - run.server_lr * movement * (gain * _mean(shares, list(arrived.values())) + c)
        c = c + sum(p[i] * value for i, value in arrived.items())
        yield x
