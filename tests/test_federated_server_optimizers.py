"""Server optimizers: golden values, and as the optimizer of a simulation; `optimizing.py` has them pass the rest."""

from typing import Any

import numpy as np
import pytest
import torch
from federating import Problem, falling, simulation, train
from reference import federated_optimizers as reference
from torch import nn

from gradwire.federated import FedAdagrad, FedAdam, FedAvg, FedYogi


@pytest.mark.parametrize(
    ("cls", "options", "second", "step"),
    [
        (FedAdam, {}, (1.0099e-4, 4.0099e-4), (0.090503, -0.095126)),
        (FedYogi, {}, (1.01e-4, 4.01e-4), None),
        (FedAdagrad, {"beta1": 0.9}, (0.010001, 0.040001), None),
    ],
)
def test_first_step(cls: Any, options: dict[str, Any], second: Any, step: Any) -> None:
    x = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = cls([x], lr=0.1, **options)
    x.grad = torch.tensor([0.1, -0.2], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[x]["exp_avg_sq"], torch.tensor(second, dtype=torch.float64))
    first = 0.1 * x.grad
    expected = 0.1 * first / (torch.tensor(second, dtype=torch.float64).sqrt() + 1e-3)
    torch.testing.assert_close(-x.detach(), expected)
    if step is not None:
        torch.testing.assert_close(-x.detach(), torch.tensor(step, dtype=torch.float64), rtol=0, atol=5e-7)


def test_differs_from_adam_in_correction_and_start() -> None:
    """With v at 0 and no correction the first step would be 0.090909; Adam's is lr."""
    steps = []
    for made in (lambda p: FedAdam(p, lr=0.1), lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), eps=1e-3)):
        x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        x.grad = torch.full_like(x, 0.1)
        made([x]).step()
        steps.append(-x.item())
    assert steps[0] == pytest.approx(0.0905, abs=1e-4)
    assert steps[1] == pytest.approx(0.1 * 0.1 / 0.101)


def test_yogi_stands_still_where_v_is_the_square() -> None:
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = FedYogi([x], tau=0.5)
    x.grad = torch.full_like(x, 0.5)
    optimizer.step()
    assert optimizer.state[x]["exp_avg_sq"].item() == 0.25


@pytest.mark.parametrize(
    ("cls", "function"),
    [(FedAdam, reference.fedadam), (FedYogi, reference.fedyogi), (FedAdagrad, reference.fedadagrad)],
)
def test_steps_along_the_pseudo_gradients_of_a_simulation(cls: Any, function: Any) -> None:
    problem = Problem()
    made = simulation(
        problem, FedAvg(), lr=falling, cohort_size=3, server_optimizer=lambda parameters: cls(parameters, lr=0.1)
    )
    plain = simulation(problem, FedAvg(), lr=falling, cohort_size=3)
    start, grads = made.server.vector.numpy().copy(), []
    for _ in range(6):
        plain.server.vector.copy_(made.server.vector)
        before = made.server.vector.numpy().copy()
        plain.step()
        made.step()
        grads.append(before - plain.server.vector.numpy())
        expected = function(start, grads, [0.1] * len(grads))
        np.testing.assert_allclose(made.server.vector.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [FedAdam, FedYogi, FedAdagrad])
def test_simulations_resume_to_the_bit(cls: Any) -> None:
    problem = Problem()

    def fresh() -> Any:
        return simulation(problem, FedAvg(), cohort_size=3, server_optimizer=lambda parameters: cls(parameters))

    whole, first, second = fresh(), fresh(), fresh()
    expected = train(whole, 6)
    train(first, 3)
    second.load_state_dict(first.state_dict())
    assert np.array_equal(train(second, 3), expected)


@pytest.mark.parametrize("cls", [FedAdam, FedYogi, FedAdagrad, torch.optim.SGD])
def test_reaches_the_fixed_point_of_fedavg(cls: Any) -> None:
    problem = Problem((1, 1), dimension=2)
    expected = train(simulation(problem, FedAvg(), lr=0.2, steps=2), 60)
    lr = 0.3 if cls is FedAdagrad else 0.1
    made = simulation(problem, FedAvg(), lr=0.2, steps=2, server_optimizer=lambda parameters: cls(parameters, lr=lr))
    assert np.abs(train(made, 150) - expected).max() < 0.05
