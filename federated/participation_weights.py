"""`ParticipationWeights`: what messages count, so that fast clients do not pull the optimum to theirs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, final

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

Weights = Literal["auto", "estimated", "importance", "identical"]
"""How messages are weighted: see `ParticipationWeights`."""


@final
class ParticipationWeights:
    """Weights with which the server, in the mean, makes steps of the loss that it is meant to make them of.

    A client that answers more often counts more often: with f_i messages a step on average and weights omega_i, the
    server minimises the mean of clients' losses weighted by `q_i = f_i omega_i`, and it is right if q_i is the client's
    importance p_i (its samples' share, or 1 / N).

        "auto"         omega_i = p_i / f_i, f_i in closed form where it is known, estimated otherwise
        "estimated"    omega_i = p_i / f_i, f_i estimated
        "importance"   omega_i = p_i N / r   right where all clients are equally fast
        "identical"    omega_i = 1 / r       as FedAsync and FedBuff were published

    r is the number of messages in a step. All of them make a step count as much as one of synchronous `FedAvg`.

    The estimate is the running mean of what arrived from the client, `f_i = (a f_i^0 + sum of s(u)) / (a + steps)`,
    over the steps before this one: a message that staleness discounts to s(u) arrived to that share. So f_i also makes
    up for a discount that hits slow clients, and for clients that drop out. It begins at f_i^0, the closed form for
    messages without discount or else r / N, which counts as much as a = N / r steps.

    Args:
        importance: By client, >= 0, not all zero; in any unit.
        arrivals: Messages in a step, r.
        participation: f_i of the same clients, in that order, > 0; None if they are not known.
        weights: Which of the four.
        discounted: Whether messages may count less for staleness: then closed forms are a beginning only.
        clip: The greatest omega_i by an estimate, in units of p_i N / r, >= 1: it bounds what rare clients count, and
            so the noise.

    Cost:
        Two numbers per client on the host.

    State:
        With estimates, the sum of s(u) of every client, and the number of steps.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> weights = ParticipationWeights({0: 1.0, 1: 1.0}, arrivals=1, participation=[0.75, 0.25])
        >>> [weights.arrive(client) / weights.total for client in (0, 1)]
        [0.6666666666666666, 2.0]

    Reference:
        Fraboni, Vidal, Kameni, Lorenzi. A General Theory for Federated Optimization with Asynchronous and Heterogeneous
        Clients Updates. JMLR 2023. arXiv:2206.10189, sections 3 and 4.

    Differences from the paper:
        The paper takes f_i from the hardware's times; the estimate, and closed forms for random times and for fewer
        clients at work than there are, are ours.
    """

    def __init__(
        self,
        importance: Mapping[int, float],
        *,
        arrivals: int,
        participation: Sequence[float] | None = None,
        weights: Weights = "auto",
        discounted: bool = False,
        clip: float = 20.0,
    ) -> None:
        if weights not in ("auto", "estimated", "importance", "identical"):
            raise ValueError(
                f"ParticipationWeights: expected auto, estimated, importance or identical, got {weights!r}."
            )
        if not clip >= 1:
            raise ValueError(f"ParticipationWeights: expected clip >= 1, got clip={clip}.")
        if not (min(importance.values()) >= 0 and sum(importance.values()) > 0):
            raise ValueError("ParticipationWeights: expected importance >= 0, not all zero, got others.")
        self.importance = dict(importance)
        self.total = float(sum(importance.values()))
        """Weights are in the unit of `importance`; divided by this they are omega."""
        self._rate = arrivals / len(importance)
        self._identical = self.total / arrivals if weights == "identical" else None
        self.estimates = weights == "estimated" or (weights == "auto" and (participation is None or discounted))
        """Whether f_i is estimated as messages arrive."""
        known = participation if weights == "auto" else None
        self._known = dict(zip(importance, known or [self._rate] * len(importance), strict=True))
        self._arrived = dict.fromkeys(importance, 0.0)
        self._steps = 0
        self._arriving: list[tuple[int, float]] = []
        self._floor = self._rate / clip

    def participation(self, client: int) -> float:
        """f_i, as far as it is known by now."""
        if not self.estimates:
            return self._known[client]
        strength = 1 / self._rate
        estimate = (strength * self._known[client] + self._arrived[client]) / (strength + self._steps)
        return max(estimate, self._floor)

    def arrive(self, client: int, discount: float = 1.0) -> float:
        """The weight of a message that has arrived and counts, before its discount."""
        self._arriving.append((client, discount))
        if self._identical is not None:
            return self._identical
        return self.importance[client] / self.participation(client)

    def step(self) -> None:
        """Count a step of the server, and what arrived for it."""
        for client, discount in self._arriving:
            self._arrived[client] += discount
        self._arriving.clear()
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What was counted."""
        return {"steps": self._steps, "arrived": list(self._arrived.values())}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._steps = saved["steps"]
        self._arrived = dict(zip(self.importance, saved["arrived"], strict=True))


def completion_shares(seconds: Sequence[float], at_work: int) -> list[float]:
    """The share of all finished jobs that is each client's, where a finished job hands its place to another client.

    Of N clients, M are at work at any time; who takes a free place is drawn evenly from those who are not, the one that
    has just finished among them. The set B of those at work then has probability proportional to the product of their
    mean times, for fixed, exponential and any other times alike; so a client finishes jobs at a rate proportional to
    the probability that it is idle while M - 1 others are at work. With M = N that is 1 / seconds, with M = 1 all are
    alike.

    Args:
        seconds: Mean time of every client's jobs, > 0.
        at_work: M, 1 <= M <= N.

    Cost:
        O(N sqrt(M)). Sums over sets are Fourier sums, of times scaled so that M - 1 is the mean number at work; no
        number becomes too small for float64.

    Example:
        >>> completion_shares([1.0, 3.0], at_work=2), completion_shares([1.0, 3.0], at_work=1)
        ([0.75, 0.25], [0.5, 0.5])

    Reference:
        Probabilities of such sets: Chen, Dempster, Liu. Weighted Finite Population Sampling to Maximize Entropy.
        Biometrika 81, 1994; by Fourier sums, Hong. On Computing the Distribution Function for the Poisson Binomial
        Distribution. Computational Statistics & Data Analysis 59, 2013.
    """
    times = np.asarray(seconds, dtype=np.float64)
    clients, others = len(times), at_work - 1
    assert 1 <= at_work <= clients
    if others in (0, clients - 1):
        rates = 1 / times if others else np.ones(clients)
        return [float(rate) for rate in rates / rates.sum()]
    busy = _scaled(times, others)
    half = min(clients, int(60 + 20 * math.sqrt((busy * (1 - busy)).sum()))) // 2 + 1
    angles = np.arange(half + 1) * (2 * math.pi / (2 * half + 1))  # an odd number of them on the circle: never pi
    logarithm = np.zeros(half + 1, dtype=np.complex128)
    for probability in busy:
        logarithm += np.log1p(probability * np.expm1(1j * angles))
    terms = np.exp(logarithm - 1j * others * angles)
    terms[1:] *= 2  # each stands for its negative, too
    idle = [(1 - p) * float((terms / (1 + p * np.expm1(1j * angles))).real.sum()) for p in busy]
    total = sum(idle)
    return [share / total for share in idle]


def _scaled(times: FloatArray, others: int) -> FloatArray:
    """Probabilities `r t / (1 + r t)` that sum to `others`."""
    low, high = -math.log(times.max()) - 50.0, -math.log(times.min()) + 50.0
    for _ in range(200):
        middle = (low + high) / 2
        if (1 / (1 + np.exp(-middle) / times)).sum() < others:
            low = middle
        else:
            high = middle
    busy: FloatArray = 1 / (1 + math.exp(-low) / times)
    return busy
