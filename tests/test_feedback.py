"""Every error feedback equals its paper in float64, conserves what it should, and converges where theory says so."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import FEEDBACKS, FeedbackCase
from numpy.typing import NDArray
from reference import sparsifiers
from torch import Tensor

from gradwire.comm import EF, EF21, Communicator, ErrorFeedback, NoFeedback, Plan, Simulated
from gradwire.compression import ChunkTopK, Compressor, ScaledSign

Array = NDArray[np.float64]
FLOAT32 = 1e-5  # ScaledSign's scale and the mean of its payloads are float32, whatever the gradient
ALL = Plan(min_ndim=0, min_numel=0)
every_feedback = pytest.mark.parametrize("case", FEEDBACKS, ids=lambda case: repr(case.feedback))


def through(compressor: Compressor) -> Callable[[Array], Array]:
    """The compressor alone, as a function of an array: no communicator, so nothing of rows, padding or batching."""
    return lambda x: compressor.decompress(compressor.compress(torch.from_numpy(x))).numpy()


def simulate(feedback: ErrorFeedback, compressor: Compressor, grads: Array) -> tuple[Array, Communicator]:
    """Feed gradients `[steps, n, ...]`; returns the estimates `[steps, ...]`."""
    n = grads.shape[1]
    communicator = Communicator(compressor, feedback=feedback, exchange=Simulated(n), plan=ALL)
    estimates = []
    for step in torch.from_numpy(grads.copy()):
        communicator.average_([step], ["x"])
        assert all(torch.equal(step[0], other) for other in step)
        estimates.append(step[0].numpy())
    return np.stack(estimates), communicator


def state_of(communicator: Communicator, name: str, shape: tuple[int, ...]) -> Array:
    """One state tensor without its padding, `[workers, *shape]`."""
    (rows,) = [rows for key, rows in communicator.state_rows().items() if key.startswith(f"{name}/")]
    return rows.flatten(1)[:, : int(np.prod(shape))].reshape(-1, *shape).numpy()


@every_feedback
@pytest.mark.parametrize("n", [2, 3])
def test_equals_reference_with_top_k(case: FeedbackCase, n: int) -> None:
    grads = np.random.default_rng(0).standard_normal((30, n, 6, 8))
    estimates, communicator = simulate(case.feedback, ChunkTopK(k=2, chunk=8), grads)
    expected, state = case.reference(grads, lambda x: sparsifiers.top_k(x, k=2))
    np.testing.assert_allclose(estimates, expected, rtol=1e-12, atol=1e-14)
    assert {key.partition("/")[0] for key in communicator.state_rows()} == state.keys()
    for name, value in state.items():
        np.testing.assert_allclose(state_of(communicator, name, (6, 8)), value, rtol=1e-12, atol=1e-14)


@every_feedback
def test_equals_reference_where_rows_are_padded(case: FeedbackCase) -> None:
    compressor = ScaledSign(width=16)  # decompresses padding to something else than zero
    grads = np.random.default_rng(1).standard_normal((30, 3, 5, 7))
    estimates, communicator = simulate(case.feedback, compressor, grads)
    expected, state = case.reference(grads, through(compressor))
    np.testing.assert_allclose(estimates, expected, rtol=0, atol=FLOAT32)
    for name, value in state.items():
        np.testing.assert_allclose(state_of(communicator, name, (5, 7)), value, rtol=0, atol=FLOAT32)
    replicated = {tensor.name for tensor in case.feedback.state if tensor.replicated}
    for key, rows in communicator.state_rows().items():  # what compensate reads; a mean's padding is never read
        assert key.partition("/")[0] in replicated or not rows.flatten(1)[:, 35:].any()


conserving = pytest.mark.parametrize(
    ("compressor", "atol"), [(ChunkTopK(k=1, chunk=16), 1e-12), (ScaledSign(width=16), FLOAT32)], ids=repr
)


@conserving
def test_ef_conserves(compressor: Compressor, atol: float) -> None:
    grads = np.random.default_rng(2).standard_normal((30, 3, 5, 7))
    estimates, communicator = simulate(EF(), compressor, grads)
    kept = state_of(communicator, "residual", (5, 7)).mean(axis=0)
    np.testing.assert_allclose(estimates.sum(axis=0) + kept, grads.mean(axis=1).sum(axis=0), rtol=0, atol=atol)
    assert np.abs(kept).max() > 0.1  # something was lost, so the sum shows something
    assert communicator.stats.residual_norm == pytest.approx(
        np.linalg.norm(state_of(communicator, "residual", (5, 7))), rel=1e-12
    )


@conserving
def test_ef21_keeps_the_mean_of_what_is_tracked(compressor: Compressor, atol: float) -> None:
    grads = np.random.default_rng(3).standard_normal((30, 3, 5, 7))
    estimates, communicator = simulate(EF21(), compressor, grads)
    local, mean = (state_of(communicator, name, (5, 7)) for name in ("local", "mean"))
    assert mean.shape[0] == 1
    np.testing.assert_allclose(local.mean(axis=0), mean[0], rtol=0, atol=atol)
    np.testing.assert_array_equal(estimates[-1], mean[0])


@every_feedback
def test_maps_leave_gradient_and_state_alone(case: FeedbackCase) -> None:
    feedback = case.feedback
    x, state = torch.randn(4, 8), {tensor.name: torch.randn(4, 8) for tensor in feedback.state}
    before, before_x = {name: value.clone() for name, value in state.items()}, x.clone()
    target = feedback.compensate(x, state)
    sent = target / 2
    if feedback.state:
        assert target.data_ptr() != x.data_ptr()
    new = feedback.update(target, sent, state)
    estimate, replicated = feedback.estimate(torch.randn(4, 8), state)
    assert new.keys() == {tensor.name for tensor in feedback.state if not tensor.replicated}
    assert replicated.keys() == {tensor.name for tensor in feedback.state if tensor.replicated}
    assert torch.equal(x, before_x)
    assert all(torch.equal(state[name], value) for name, value in before.items())
    for value in (new | replicated).values():
        assert value.data_ptr() not in {old.data_ptr() for old in state.values()}
        assert value.shape == estimate.shape


@every_feedback
def test_state_round_trip(case: FeedbackCase) -> None:
    grads = np.random.default_rng(4).standard_normal((20, 3, 5, 7))
    whole, _ = simulate(case.feedback, ChunkTopK(k=2, chunk=16), grads)
    _, communicator = simulate(case.feedback, ChunkTopK(k=2, chunk=16), grads[:9])
    resumed = Communicator(ChunkTopK(k=2, chunk=16), feedback=case.feedback, exchange=Simulated(3), plan=ALL)
    resumed.load_state_dict(communicator.state_dict())
    for step, expected in zip(torch.from_numpy(grads[9:].copy()), whole[9:], strict=True):
        resumed.average_([step], ["x"])
        np.testing.assert_array_equal(step[0].numpy(), expected)


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [(type(case.feedback), arguments, message) for case in FEEDBACKS for arguments, message in case.errors],
)
def test_refuses(cls: type, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__}: expected .*{message}"):
        cls(**arguments)


# Theory. Gradient descent with n simulated workers on problems whose behaviour is known in closed form.


def descend(
    feedback: ErrorFeedback,
    compressor: Compressor,
    gradient: Callable[[Tensor], Tensor],
    x: Tensor,
    lr: float,
    steps: int,
) -> tuple[Tensor, Communicator]:
    """Gradient descent; `gradient` gives all workers' gradients `[n, d]`. Returns all iterates `[steps + 1, d]`."""
    communicator = Communicator(compressor, feedback=feedback, exchange=Simulated(gradient(x).shape[0]), plan=ALL)
    iterates = [x]
    for _ in range(steps):
        grads = gradient(iterates[-1])
        communicator.average_([grads], ["x"])
        iterates.append(iterates[-1] - lr * grads[0])
    return torch.stack(iterates), communicator


A = torch.tensor([[-3.0, 2, 2], [2, -3, 2], [2, 2, -3]], dtype=torch.float64)
TOP_1 = ChunkTopK(k=1, chunk=3)


def three_workers(x: Tensor) -> Tensor:
    """f_i(x) = <a_i, x>^2 + |x|^2 / 4: example 1 of Beznosikov et al. 2020."""
    return 2 * (A @ x)[:, None] * A + x / 2


def test_top_1_without_feedback_grows_exponentially() -> None:
    """From x = c (1, 1, 1) every worker sends -11/2 c at its own entry, so x grows by 1 + 11 lr / 6 a step."""
    lr = 0.05
    x, _ = descend(NoFeedback(), TOP_1, three_workers, torch.ones(3, dtype=torch.float64), lr, 200)
    growth = x[1:] / x[:-1]
    assert (growth - (1 + 11 * lr / 6)).abs().max() < 1e-9


@pytest.mark.parametrize("feedback", [EF(), EF21()], ids=repr)
def test_feedback_repairs_the_example(feedback: ErrorFeedback) -> None:
    """At EF21's largest proven step both contract like gradient descent: by 1 - lr mu a step."""
    delta, smoothness, mu, local_smoothness = 1 / 3, 103 / 6, 7 / 6, 34.5
    xi = (1 + (1 - delta) ** 0.5) / delta - 1
    lr = 1 / (smoothness + local_smoothness * xi)
    x, _ = descend(feedback, TOP_1, three_workers, torch.ones(3, dtype=torch.float64), lr, 1500)
    norms = torch.linalg.vector_norm(x, dim=1)
    factor = float(norms[1500] / norms[500]) ** (1 / 1000)
    assert factor == pytest.approx(1 - lr * mu, abs=2e-4)
    assert norms[1500] < 1e-3


def test_ef_virtual_iterate_follows_exact_descent() -> None:
    """x - lr mean e moves by -lr mean g exactly (Stich et al. 2018, equation 7), along the trajectory of x."""
    lr = 0.005
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for steps in (1, 10, 300):
        x, communicator = descend(EF(), TOP_1, three_workers, start, lr, steps)
        exact = start - lr * sum(three_workers(point).mean(dim=0) for point in x[:-1])
        virtual = x[-1] - lr * torch.from_numpy(state_of(communicator, "residual", (3,))).mean(dim=0)
        assert (virtual - exact).abs().max() < 1e-12


def heterogeneous(x: Tensor) -> Tensor:
    """Eight quadratics of different curvature whose gradients at the optimum x = 0 are large and cancel."""
    rng = torch.Generator().manual_seed(7)
    curvature = 0.5 + torch.rand(8, x.numel(), generator=rng, dtype=torch.float64)
    shift = 100 * torch.randn(8, x.numel(), generator=rng, dtype=torch.float64)
    return curvature * x + shift - shift.mean(dim=0)


def test_heterogeneity_leaves_ef_a_floor_of_lr_squared_and_ef21_none() -> None:
    start = torch.zeros(16, dtype=torch.float64)
    compressor = ChunkTopK(k=4, chunk=16)
    floors = []
    for lr in (2e-2, 1e-2, 5e-3):
        x, _ = descend(EF(), compressor, heterogeneous, start, lr, int(12 / lr))
        floors.append(float(x[len(x) // 3 :].square().sum(dim=1).mean()))
    assert floors[0] / floors[1] == pytest.approx(4, rel=0.2)
    assert floors[1] / floors[2] == pytest.approx(4, rel=0.2)
    x, _ = descend(EF21(), compressor, heterogeneous, start, 5e-2, 1000)
    assert float(x[-1].square().sum()) < 1e-20
