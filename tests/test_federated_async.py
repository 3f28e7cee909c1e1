"""Asynchronous training against an event simulation in NumPy, closed forms, and synchronous training."""

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from async_points import TAU, UNIFORM, B, P, points, settled
from reference import asynchronous as reference

from gradwire.federated import (
    AsyncFedAvg,
    AsyncPolicy,
    ClientTimes,
    ExponentialTimes,
    FedAsync,
    FedBuff,
    FedFix,
    FixedTimes,
    HalfNormalTimes,
    ParticipationWeights,
    RoundRecord,
)
from gradwire.federated.async_policy import hinge, polynomial
from gradwire.federated.client_times import Job
from gradwire.federated.clock import TICKS_PER_SECOND
from gradwire.federated.participation_weights import completion_shares

# Each: policy, importance, and the reference's arguments.
ASYNC = [12 / 6 * tau * p for tau, p in zip(TAU, P, strict=True)]
TRAJECTORIES: list[tuple[AsyncPolicy, Sequence[float], dict[str, Any]]] = [
    (AsyncFedAvg(), P, {"omega": ASYNC}),
    (AsyncFedAvg(weights="identical"), P, {"omega": [1.0] * 4}),
    (AsyncFedAvg(weights="importance"), P, {"omega": [4 * p for p in P]}),
    (AsyncFedAvg(weights="estimated"), P, {}),
    (FedAsync(alpha=0.5, staleness="constant"), P, {"omega": ASYNC, "alpha": 0.5}),
    (FedAsync(weights="identical"), P, {"omega": [1.0] * 4, "alpha": 0.6, "discount": lambda u: (1 + u) ** -0.5}),
    (
        FedAsync(weights="identical", delta_from="current", staleness=lambda u: 0.5**u),
        P,
        {"omega": [1.0] * 4, "alpha": 0.6, "discount": lambda u: 0.5**u, "mixes": True},
    ),
    (FedFix(2.5), P, {"omega": [0.4, 0.3, 2 * 0.2, 3 * 0.1], "interval": Fraction(5, 2)}),
    (FedFix(1.0, weights="estimated"), P, {"interval": Fraction(1)}),
    (FedFix(2.0, weights="identical"), P, {"omega": UNIFORM, "interval": Fraction(2)}),
    (
        FedBuff(2, weights="identical"),
        UNIFORM,
        {"omega": [0.5] * 4, "buffer": 2, "discount": lambda u: (1 + u) ** -0.5},
    ),
    (FedBuff(3, staleness="constant"), P, {"omega": [w / 3 for w in ASYNC], "buffer": 3}),
    (FedBuff(3, weights="estimated"), P, {"buffer": 3, "discount": lambda u: (1 + u) ** -0.5}),
    (
        FedBuff(2, weights="identical", staleness="constant", open_slots=2),
        UNIFORM,
        {"omega": [0.5] * 4, "buffer": 2, "waits": True},
    ),
]


@pytest.mark.parametrize("random", [False, True], ids=["fixed", "drawn"])
@pytest.mark.parametrize(
    ("policy", "p", "options"),
    TRAJECTORIES,
    ids=lambda value: "" if isinstance(value, dict) else re.sub(" at 0x\\w+", "", str(value)),
)
def test_equals_the_event_simulation(
    policy: AsyncPolicy, p: Sequence[float], options: dict[str, Any], random: bool
) -> None:
    times = HalfNormalTimes(TAU) if random else FixedTimes(TAU)
    if random and isinstance(policy, FedFix) and policy.weights == "auto":
        counts = [times.mean_intervals(Job(i), round(policy.interval * TICKS_PER_SECOND)) or 0 for i in range(4)]
        step = 1 - np.prod([1 - 1 / count for count in counts])
        options = options | {"omega": [share * count * step for share, count in zip(p, counts, strict=True)]}
    run = reference.Asynchronous(
        B, p, lambda i, k: Fraction(times.duration(Job(i, k), seed=9), TICKS_PER_SECOND), 0.1, 5.0, **options
    )
    xs, when, ages = run.run(60)
    made = points(policy, times, p=p, lr=0.1, seed=9)
    records: list[RoundRecord] = []
    found = [(records.append(record), made.module.x.item())[1] for record in made.run(60)]
    np.testing.assert_allclose(found, xs, rtol=0, atol=1e-12 * max(1.0, float(np.abs(xs).max())))
    np.testing.assert_allclose([record.time for record in records], when, rtol=1e-15)
    assert [record.staleness for record in records] == pytest.approx(ages)


TABLE = [
    (AsyncFedAvg(weights="identical"), P, 1.4167),
    (AsyncFedAvg(), P, 1.7000),
    (FedFix(1.0), P, 1.6995),
    (FedFix(2.0), P, 1.6999),
    (FedFix(2.5), P, 1.6999),
    (FedFix(6.0), P, 1.7000),
    (FedFix(1.0, weights="importance"), P, 0.710),
    (FedFix(2.0, weights="importance"), P, 1.000),
    (FedFix(2.5, weights="importance"), P, 1.000),
    (FedFix(6.0, weights="importance"), P, 1.700),
    (FedBuff(2, staleness="constant", open_slots=2, weights="identical"), UNIFORM, 1.700),
    (FedBuff(2, staleness="constant", open_slots=2), UNIFORM, 3.249),
    (FedBuff(2, staleness="constant", weights="identical"), UNIFORM, 1.4167),
    (FedBuff(2, staleness="constant"), UNIFORM, 3.25),
    (FedBuff(2), UNIFORM, 3.25),  # the discount hits slow clients: weights make up for it
]


@pytest.mark.parametrize(("policy", "p", "optimum"), TABLE, ids=str)
def test_where_fixed_times_lead(policy: AsyncPolicy, p: Sequence[float], optimum: float) -> None:
    start = float(np.dot(p, B)) + 0.3
    assert settled(points(policy, p=p, lr=0.02, start=start), 600) == pytest.approx(optimum, abs=0.02)


class Mislaid(ClientTimes):
    """Exponential times that pass for fixed ones."""

    def __init__(self, seconds: Sequence[float]) -> None:
        self.real, self.assumed = ExponentialTimes(seconds), FixedTimes(seconds)

    def check(self, clients: int) -> None:
        self.real.check(clients)

    def duration(self, job: Job, seed: int) -> int:
        return self.real.duration(job, seed)

    def mean_intervals(self, job: Job, interval: int) -> float | None:
        return self.assumed.mean_intervals(job, interval)


@pytest.mark.parametrize(
    ("policy", "times", "optimum"),
    [
        (AsyncFedAvg(), ExponentialTimes(TAU), 1.69),
        (FedFix(1.0), ExponentialTimes(TAU), 1.694),
        (FedFix(3.0), ExponentialTimes(TAU), 1.702),
        (FedFix(1.0), Mislaid(TAU), 1.987),
        (FedFix(3.0), Mislaid(TAU), 1.558),
        (FedFix(2.0), HalfNormalTimes(TAU), 1.7),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, ClientTimes) else str(value),
)
def test_where_random_times_lead(policy: AsyncPolicy, times: ClientTimes, optimum: float) -> None:
    """The fixed point is sum q_i b_i / sum q_i; q_i is measured over many steps, without training."""
    made = points(policy, times, seed=5)
    arrived = np.zeros(4)
    interval = None if policy.interval is None else round(policy.interval * TICKS_PER_SECOND)
    steps = 6000 if interval is None else 12000
    for _ in range(steps):
        made.dispatcher.fill_places(0, made.server.vector)
        clock = made.dispatcher.clock
        if interval is None:
            flights = [clock.next_arrival()]
        else:
            flights = clock.arrivals_until(-(-clock.next_tick // interval) * interval)
        for flight in flights:
            made.dispatcher.finish(flight)
            arrived[flight.client] += made.weights.arrive(flight.client) / made.weights.total
    q = arrived / steps
    assert np.dot(q, B) / q.sum() == pytest.approx(optimum, abs=0.05)
    if not isinstance(times, Mislaid):
        np.testing.assert_allclose(q, P, rtol=0.08)  # each step counts as much as one of FedAvg


def test_training_with_random_times_reaches_the_optimum() -> None:
    found = settled(points(FedFix(2.0), ExponentialTimes(TAU), lr=0.02, start=2.0, seed=1), 500)
    assert found == pytest.approx(1.7, abs=0.12)


@pytest.mark.parametrize("at_work", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("seconds", [(1.0, 2.0, 3.0, 6.0, 0.5), (1.0, 100.0, 1.0, 1e-3, 5.0)])
def test_completion_shares_solve_the_balance_equations(seconds: tuple[float, ...], at_work: int) -> None:
    expected = reference.completion_shares(seconds, at_work)
    np.testing.assert_allclose(completion_shares(seconds, at_work), expected, rtol=1e-10)


@pytest.mark.parametrize("times", [FixedTimes, ExponentialTimes])
def test_completion_shares_hold_for_any_law(times: Any) -> None:
    seconds = (1.0, 2.1, 3.3, 6.7, 0.4, 9.0)
    made = points(AsyncFedAvg(), times(seconds), p=(1.0,) * 6, b=(0.0,) * 6, concurrency=4)
    counts = np.zeros(6)
    for _ in range(12000):
        made.dispatcher.fill_places(0, made.server.vector)
        flight = made.dispatcher.clock.next_arrival()
        made.dispatcher.finish(flight)
        counts[flight.client] += 1
    np.testing.assert_allclose(counts / counts.sum(), completion_shares(seconds, 4), rtol=0.08)


def test_completion_shares_of_many_clients_are_finite_and_in_order() -> None:
    seconds = np.exp(np.linspace(-4, 4, 2000)).tolist()
    for at_work in (2, 1000, 1999):
        shares = completion_shares(seconds, at_work)
        assert np.isfinite(shares).all()
        assert sum(shares) == pytest.approx(1)
        assert all(a >= b > 0 for a, b in pairwise(shares))


def test_golden_values_of_staleness() -> None:
    ages = (0, 1, 4, 10)
    assert [polynomial(u) for u in ages] == pytest.approx([1, 0.7071, 0.4472, 0.3015], abs=5e-5)
    assert [hinge(u) for u in ages] == pytest.approx([1, 1, 1, 0.016393], abs=5e-7)
    assert [FedAsync(staleness="constant").discount(u) for u in ages] == [1.0] * 4
    assert [FedAsync(staleness="hinge").discount(u) for u in ages] == [hinge(u) for u in ages]
    assert [FedBuff().discount(u) for u in ages] == [polynomial(u) for u in ages]
    assert FedAsync(alpha=lambda step: 0.6 / (1 + step)).scale(2) == pytest.approx(0.2)


def test_staleness_is_what_concurrency_and_buffer_make_it() -> None:
    made = points(FedBuff(5, weights="identical"), ExponentialTimes(1.0), p=(1.0,) * 30, b=(0.0,) * 30, concurrency=20)
    ages = [record.staleness for record in made.run(300)]
    assert np.mean(ages[20:]) == pytest.approx((20 - 1) / 5, rel=0.04)


class TestWeights:
    def test_four_ways(self) -> None:
        importance = {3: 6.0, 7: 2.0}
        for weights, expected in (
            ("auto", [0.75 / 1.5, 0.25 / 0.5]),
            ("importance", [0.75, 0.25]),
            ("identical", [0.5, 0.5]),
        ):
            made = ParticipationWeights(importance, arrivals=2, participation=[1.5, 0.5], weights=weights)
            assert [made.arrive(client) / made.total for client in importance] == expected

    def test_estimates_follow_what_arrives(self) -> None:
        made = ParticipationWeights({0: 1.0, 1: 1.0}, arrivals=1, participation=[0.9, 0.1], discounted=True, clip=4.0)
        assert made.estimates
        assert made.participation(0) == pytest.approx(0.9)  # the closed form is where it begins
        for step in range(4000):
            made.arrive(int(step % 4 == 0), discount=0.5)
            made.step()
        assert made.participation(0) == pytest.approx(0.375, abs=1e-3)
        assert made.participation(1) == pytest.approx(0.125, abs=1e-3)
        for _ in range(8000):
            made.step()
        assert made.participation(1) == 0.5 / 4  # clipped: its weight is at most 4 p N / r

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="expected auto, estimated, importance or identical, got 'right'"):
            ParticipationWeights({0: 1.0}, arrivals=1, weights="right")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="expected importance >= 0, not all zero"):
            ParticipationWeights({0: 0.0}, arrivals=1)
        with pytest.raises(ValueError, match="expected clip >= 1"):
            ParticipationWeights({0: 1.0}, arrivals=1, clip=0.5)
