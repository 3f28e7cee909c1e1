"""`estimate_smoothness` against NumPy's eigenvalues."""

import math

import numpy as np
import pytest
import torch

from gradwire.comm import estimate_smoothness


def symmetric(*eigenvalues: float, seed: int = 0) -> torch.Tensor:
    """A float64 matrix with these eigenvalues and random eigenvectors."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues),) * 2))
    return torch.from_numpy(q @ np.diag(eigenvalues) @ q.T)


@pytest.mark.parametrize("eigenvalues", [(5.0, 1.0, 0.5, -2.0), (-7.0, 3.0, 0.0, 1.0), (4.0, -4.0, 1.0, 0.1), (2.0,)])
def test_a_quadratic_gives_its_largest_eigenvalue(eigenvalues: tuple[float, ...]) -> None:
    """Also where it is negative, and where both signs are equally large, which has no single eigenvector."""
    hessian = symmetric(*eigenvalues)
    x = torch.full((len(eigenvalues),), 3.0, dtype=torch.float64, requires_grad=True)
    truth = np.abs(np.linalg.eigvalsh(hessian.numpy())).max()
    loss = x @ hessian @ x / 2 + x.sum()
    assert estimate_smoothness(loss, [x], iterations=40) == pytest.approx(truth, rel=1e-9)


def test_least_squares_over_several_tensors() -> None:
    rng = np.random.default_rng(1)
    data, target = rng.normal(size=(50, 6)) * [4, 1, 1, 1, 1, 1], rng.normal(size=50)
    weight = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros((), dtype=torch.float64, requires_grad=True)
    unused = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    error = torch.from_numpy(data) @ weight.flatten() + bias - torch.from_numpy(target)
    columns = np.concatenate([data, np.ones((50, 1))], axis=1)
    truth = np.linalg.eigvalsh(columns.T @ columns / 50 * 2).max()
    assert estimate_smoothness(error.square().mean(), [weight, bias, unused]) == pytest.approx(truth, rel=1e-9)


def test_it_is_local() -> None:
    x = torch.tensor([0.5, -2.0], dtype=torch.float64, requires_grad=True)
    assert estimate_smoothness((x**4).sum(), [x], iterations=30) == pytest.approx(12 * 4, rel=1e-9)


def test_a_gradient_in_place_of_a_loss_can_be_used_again() -> None:
    hessian = symmetric(3.0, 1.0, 0.2)
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    gradient = torch.autograd.grad(x @ hessian @ x / 2, [x], create_graph=True)
    once, again = (estimate_smoothness(gradient, [x], iterations=30) for _ in range(2))
    assert once == again == pytest.approx(3.0, rel=1e-9)


def test_more_iterations_come_closer_from_below() -> None:
    x = torch.ones(30, dtype=torch.float64, requires_grad=True)
    hessian = symmetric(*np.linspace(0.1, 3.0, 30))
    gradient = torch.autograd.grad(x @ hessian @ x / 2, [x], create_graph=True)
    found = [estimate_smoothness(gradient, [x], iterations=count) for count in (1, 2, 5, 20, 200)]
    assert found == sorted(found)
    assert found[0] < 2.5
    assert found[-1] == pytest.approx(3.0, rel=1e-6)
    assert found[-1] <= 3.0 * (1 + 1e-12)


def test_it_draws_from_no_generator_and_leaves_gradients_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    x = torch.randn(8, 5)
    found, states = [], []
    for seed in (0, 0, 1):
        states.append(torch.get_rng_state())
        loss = model(x).square().mean()
        found.append(estimate_smoothness(loss, model.parameters(), iterations=3, seed=seed))
        torch.autograd.grad(loss, list(model.parameters()))  # its graph is still there
    assert found[0] == found[1] != found[2]
    assert torch.equal(states[0], torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_equals_the_hessian_of_a_network() -> None:
    torch.manual_seed(3)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x, y = torch.randn(9, 3, dtype=torch.float64), torch.randint(4, (9,))

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(torch.tanh(x @ weight.T), y)

    hessian = torch.autograd.functional.hessian(loss, weight).reshape(12, 12)
    truth = np.abs(np.linalg.eigvalsh(hessian.numpy())).max()
    assert estimate_smoothness(loss(weight), [weight], iterations=300) == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.ones(3, dtype=dtype, requires_grad=True)
    loss = (torch.tensor([8.0, 1.0, 0.5], dtype=dtype) * x.square()).sum()
    assert estimate_smoothness(loss, [x]) == pytest.approx(16.0, rel=torch.finfo(dtype).eps)


def test_no_curvature_is_zero() -> None:
    x = torch.ones(3, requires_grad=True)
    assert estimate_smoothness(3 * x.sum(), [x]) == 0.0
    assert estimate_smoothness((0 * x.square()).sum(), [x]) == 0.0
    assert estimate_smoothness(x.sum() + x.detach().square().sum(), [x]) == 0.0


def test_mistakes_are_refused() -> None:
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(ValueError, match="expected at least one of parameters"):
        estimate_smoothness(x.sum(), [])
    with pytest.raises(ValueError, match="iterations=0"):
        estimate_smoothness(x.sum(), [x], iterations=0)
    with pytest.raises(ValueError, match=r"expected a 0-d loss that depends on the parameters, got shape \(3,\)"):
        estimate_smoothness(x.square(), [x])
    with pytest.raises(ValueError, match="requires_grad=False"):
        estimate_smoothness(torch.ones(()), [x])
    with pytest.raises(ValueError, match=r"expected a gradient of shapes \[\(3,\)\], got \[\(2,\)\]"):
        estimate_smoothness([torch.ones(2)], [x])
    assert math.isnan(estimate_smoothness((x.square() * float("nan")).sum(), [x]))
