"""Robust rules inside of simulations, with one Byzantine client of seven; which parts fit; what sums are enough for."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from federating import Problem, simulation, train
from torch import Tensor

from gradwire.compression import RandomK, TopK
from gradwire.federated import (
    SCAFCOM,
    SCAFFOLD,
    SCALLION,
    TIES,
    Aggregator,
    Algorithm,
    Bucketing,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    FedAvg,
    FisherAveraging,
    GeometricMedian,
    Krum,
    Link,
    LocalWork,
    MultiKrum,
    NormClipping,
    Round,
    TrimmedMean,
    WeightedMean,
    check_sum_only,
)


@dataclass(frozen=True)
class Attacked(Algorithm):
    """FedAvg, of which one client sends the opposite of its pseudo-gradient, many times over."""

    factor: float = -40.0

    def message(self, work: LocalWork) -> dict[str, Tensor]:
        factor = self.factor if work.client == 3 else 1.0
        return {"pseudo_gradient": factor * work.pseudo_gradient}

    def server_step(self, mean: Any, state: dict[str, Tensor], round: Round) -> Tensor:
        return mean["pseudo_gradient"]  # type: ignore[no-any-return]


def similar() -> Problem:
    problem = Problem((2,) * 7)
    for b in problem.b:
        b[:] = 3.0 + 0.1 * b
    return problem


def distance(aggregator: Aggregator | None, algorithm: Algorithm) -> float:
    problem = similar()
    made = simulation(problem, algorithm, aggregator=aggregator)
    honest = [float(i != 3) for i in range(7)]
    return float(np.abs(train(made, 30) - problem.optimum(honest)).max())


ROBUST = [
    CoordinateMedian(),
    TrimmedMean(0.2),
    Krum(1),
    MultiKrum(1),
    Bulyan(1),
    GeometricMedian(),
    NormClipping(0.5, CoordinateMedian()),
    NormClipping(1.0),
    CenteredClipping(tau=0.3),
    Bucketing(CoordinateMedian(), s=2),
]


@pytest.mark.parametrize("aggregator", ROBUST, ids=str)
def test_one_attacker_does_not_draw_robust_rules_away(aggregator: Aggregator) -> None:
    assert distance(aggregator, Attacked()) < 0.5
    assert distance(aggregator, FedAvg()) < 0.5


@pytest.mark.parametrize("aggregator", [None, TIES(density=1.0)], ids=str)
def test_one_attacker_draws_means_away(aggregator: Aggregator | None) -> None:
    assert not distance(aggregator, Attacked()) < 100
    assert distance(aggregator, FedAvg()) < 0.5


@pytest.mark.parametrize("aggregator", [CenteredClipping(tau=0.3), Bucketing(CenteredClipping(tau=0.3), s=2)], ids=str)
def test_a_run_resumes_with_what_the_aggregator_remembers(aggregator: Aggregator) -> None:
    problem = Problem()
    whole, first, resumed = (simulation(problem, FedAvg(), aggregator=aggregator) for _ in range(3))
    expected = train(whole, 6)
    train(first, 3)
    resumed.load_state_dict(first.state_dict())
    assert np.array_equal(train(resumed, 3), expected)
    forgetful = simulation(problem, FedAvg(), aggregator=aggregator)
    forgetful.server.vector.copy_(torch.tensor(train(simulation(problem, FedAvg(), aggregator=aggregator), 3)))
    assert not np.array_equal(train(forgetful, 3), expected)


@pytest.mark.parametrize("aggregator", [CoordinateMedian(), NormClipping(1.0), TIES(), CenteredClipping()], ids=str)
@pytest.mark.parametrize("algorithm", [SCAFFOLD(), FisherAveraging()], ids=["SCAFFOLD", "FisherAveraging"])
def test_what_is_right_for_means_refuses_others(aggregator: Aggregator, algorithm: Algorithm) -> None:
    with pytest.raises(ValueError, match=f"expected a mean, since {type(algorithm).__name__} is right for means alone"):
        simulation(Problem(), algorithm, aggregator=aggregator)
    simulation(Problem(), algorithm, aggregator=WeightedMean(by_entry=True)).step()


def test_cohorts_that_are_too_small_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"Krum: expected at least 2 byzantine \+ 3 = 5 messages in a round, got 4"):
        simulation(Problem(), FedAvg(), aggregator=Krum(1), cohort_size=4)
    made = simulation(Problem(), FedAvg(), aggregator=Krum(1), cohort_size=5)
    made._drops_out = lambda round, client: client == made.cohort(round)[0]  # type: ignore[method-assign]
    x = made.server.vector.clone()
    with pytest.raises(ValueError, match="Krum: expected at least"):
        made.step()
    assert torch.equal(made.server.vector, x)


def test_what_sums_are_enough_for() -> None:
    algorithms: list[Algorithm] = [FedAvg(), SCAFFOLD(), FisherAveraging()]
    assert [check_sum_only(algorithm) for algorithm in algorithms] == [1, 1, 1]
    passes = [
        (WeightedMean(by_entry=True), 1),
        (TIES(), 1),
        (NormClipping(1.0), 1),
        (CenteredClipping(iterations=3), 3),
        (GeometricMedian(iterations=4), 5),
        (NormClipping(1.0, GeometricMedian(iterations=4)), 5),
    ]
    for aggregator, expected in passes:
        assert check_sum_only(FedAvg(), aggregator) == expected
    for refused in (CoordinateMedian(), TrimmedMean(), Krum(1), MultiKrum(1), Bulyan(1), NormClipping(1.0, Krum(1))):
        with pytest.raises(ValueError, match="expected an aggregator that sums are enough for, got"):
            check_sum_only(FedAvg(), refused)
    with pytest.raises(ValueError, match="got Bucketing"):
        check_sum_only(FedAvg(), Bucketing(CenteredClipping()))
    assert check_sum_only(SCALLION(RandomK(k=1, chunk=4))) == 1
    assert check_sum_only(FedAvg(), uplink=Link(RandomK(k=1, chunk=4))) == 1
    for algorithm, uplink in ((SCAFCOM(TopK(ratio=0.1)), None), (FedAvg(), Link(TopK(ratio=0.1)))):
        with pytest.raises(ValueError, match="expected a compressor whose payloads may be added, got TopK"):
            check_sum_only(algorithm, uplink=uplink)
