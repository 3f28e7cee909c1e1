"""Float64 NumPy reference of asynchronous federated training on f_i(x) = (x - b_i)^2 / 2: times are exact fractions.

Written as the papers tell it, with one row per client that says when it is done, and no queue.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from math import ceil

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass
class Asynchronous:
    """All clients are at work, each with one local step of gradient descent.

    Args:
        b: Minima of the clients' losses.
        p: Their importance; sums to 1.
        duration: Of (client, number of its job), in seconds.
        lr: Of the local step.
        start: x at first.
        omega: What a message of each client counts; None for p / f with a running estimate of f.
        buffer: Messages in a step.
        waits: Whether clients whose messages lie in the buffer wait for the step.
        interval: Seconds between steps, in place of a buffer.
        discount: Of staleness.
        alpha: Factor of the whole step.
        mixes: Whether models are mixed, in place of adding differences from models that were sent.
    """

    b: Sequence[float]
    p: Sequence[float]
    duration: Callable[[int, int], Fraction]
    lr: float
    start: float
    omega: Sequence[float] | None = None
    buffer: int = 1
    waits: bool = False
    interval: Fraction | None = None
    discount: Callable[[int], float] = lambda u: 1.0
    alpha: float = 1.0
    mixes: bool = False

    def run(self, steps: int) -> tuple[Array, list[float], list[float]]:
        """x after every step, the time of every step, and the mean staleness of its messages."""
        clients = len(self.b)
        self.x, self.version, self.now = self.start, 0, Fraction(0)
        self.jobs, self.began, self.given = [0] * clients, [0] * clients, 0
        self.done: list[Fraction | None] = [None] * clients
        self.base, self.base_version = [0.0] * clients, [0] * clients
        self.credit = [1.0] * clients  # one message each, before the first step
        for client in range(clients):
            self._begin(client)
        path, times, ages = [], [], []
        while self.version < steps:
            self.pending: list[tuple[int, float]] = []
            age = self._step()
            self.version += 1
            for client, s in self.pending:
                self.credit[client] += s
            path.append(self.x)
            times.append(float(self.now))
            ages.append(age)
            for client in range(clients):
                if self.done[client] is None:
                    self._begin(client)
        return np.array(path), times, ages

    def _begin(self, client: int) -> None:
        self.done[client] = self.now + self.duration(client, self.jobs[client])
        self.jobs[client] += 1
        self.began[client], self.given = self.given, self.given + 1
        self.base[client], self.base_version[client] = self.x, self.version

    def _step(self) -> float:
        change, ages = 0.0, []
        if self.interval is not None:
            first = min(done for done in self.done if done is not None)
            self.now = ceil(first / self.interval) * self.interval
            for client, done in enumerate(self.done):
                if done is not None and done <= self.now:
                    change += self._take(client, ages)
        else:
            while len(ages) < self.buffer:
                busy = [client for client, done in enumerate(self.done) if done is not None]
                client = min(busy, key=lambda client: (self.done[client], self.began[client]))
                self.now = self.done[client] or self.now
                change += self._take(client, ages)
                if not self.waits and len(ages) < self.buffer:
                    self._begin(client)
        self.x += change
        return float(np.mean(ages))

    def _take(self, client: int, ages: list[int]) -> float:
        """What a client's message adds to x."""
        age = self.version - self.base_version[client]
        ages.append(age)
        self.done[client] = None
        model = self.base[client] - self.lr * (self.base[client] - self.b[client])
        s = self.discount(age)
        if self.omega is None:
            self.pending.append((client, s))
            usual = 1.0 if self.interval is not None else self.buffer / len(self.b)
            omega = self.p[client] / (self.credit[client] / (1 / usual + self.version))
        else:
            omega = self.omega[client]
        return self.alpha * s * omega * (model - (self.x if self.mixes else self.base[client]))


def completion_shares(seconds: Sequence[float], at_work: int) -> Array:
    """Shares of finished jobs, from the balance of all sets of clients that can be at work, one by one."""
    clients = len(seconds)
    sets = list(combinations(range(clients), at_work))
    number = {busy: place for place, busy in enumerate(sets)}
    rates = np.zeros((len(sets), len(sets)))
    for busy in sets:
        for leaves in busy:
            candidates = [client for client in range(clients) if client not in busy or client == leaves]
            for begins in candidates:
                after = tuple(sorted({*busy, begins} - ({leaves} - {begins})))
                rates[number[busy], number[after]] += 1 / seconds[leaves] / len(candidates)
    balance = rates.T - np.diag(rates.sum(1))
    balance[-1] = 1.0
    share = np.linalg.solve(balance, np.eye(len(sets))[-1])
    flow = np.zeros(clients)
    for busy, probability in zip(sets, share, strict=True):
        for client in busy:
            flow[client] += probability / seconds[client]
    result: Array = flow / flow.sum()
    return result
