"""Every error feedback equals its paper in float64, conserves what it should, and converges where theory says so."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from cases import FEEDBACKS, FeedbackCase
from numpy.typing import NDArray
from reference import sparsifiers

from gradwire.comm import EF, EF21, Communicator, EControl, ErrorFeedback, Plan, Simulated
from gradwire.compression import BlockQuantize, ChunkTopK, Compressor, RandomK, ScaledSign, counter_rng

Array = NDArray[np.float64]
FLOAT32 = 1e-5  # ScaledSign's scale and the mean of its payloads are float32, whatever the gradient
ALL = Plan(min_ndim=0, min_numel=0)
every_feedback = pytest.mark.parametrize("case", FEEDBACKS, ids=lambda case: repr(case.feedback))


def through(compressor: Compressor) -> Callable[[Array], Array]:
    """The compressor alone, as a function of an array: no communicator, so nothing of rows, padding or batching."""
    return lambda x: compressor.decompress(compressor.compress(torch.from_numpy(x))).numpy()


def random_k(k: int) -> Callable[..., Array]:
    """The reference of `RandomK` as a function of an array and the step, with the draws that the communicator makes."""

    def compress(x: Array, step: int) -> Array:
        keys = counter_rng.at_step(counter_rng.row_keys(counter_rng.fold("x"), x.shape[0]), counter_rng.fold(0, step))
        return sparsifiers.random_k(x, k=k, keys=keys.numpy())

    return compress


def workers_of(feedback: ErrorFeedback, n: int) -> int:
    """`n`, unless the mechanism knows its workers."""
    return n if feedback.weights is None else len(feedback.weights)


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
def test_equals_reference(case: FeedbackCase, n: int) -> None:
    grads = np.random.default_rng(0).standard_normal((30, workers_of(case.feedback, n), 6, 8))
    unbiased = case.feedback.requires == "unbiased"
    compressor = RandomK(k=2, chunk=8) if unbiased else ChunkTopK(k=2, chunk=8)
    estimates, communicator = simulate(case.feedback, compressor, grads)
    expected, state = case.reference(grads, random_k(2) if unbiased else lambda x: sparsifiers.top_k(x, k=2))
    np.testing.assert_allclose(estimates, expected, rtol=1e-12, atol=1e-13)
    assert {key.partition("/")[0] for key in communicator.state_rows()} == state.keys()
    for name, value in state.items():
        np.testing.assert_allclose(state_of(communicator, name, (6, 8)), value, rtol=1e-12, atol=1e-13)


@every_feedback
def test_equals_reference_where_rows_are_padded(case: FeedbackCase) -> None:
    unbiased = case.feedback.requires == "unbiased"
    # The first decompresses padding to something else than zero; draws of the second are per row of 16 entries.
    compressor: Compressor = RandomK(k=4, chunk=16) if unbiased else ScaledSign(width=16)
    grads = np.random.default_rng(1).standard_normal((30, workers_of(case.feedback, 3), 5, 7))
    estimates, communicator = simulate(case.feedback, compressor, grads)
    if unbiased:
        draw = random_k(4)
        expected, state = case.reference(
            grads, lambda x, t: draw(np.pad(x.ravel(), (0, 13)).reshape(3, 16), t).ravel()[:35].reshape(5, 7)
        )
    else:
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
    feedback = case.feedback.fit(RandomK(k=2, chunk=8))
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
    if any(feedback.sends_dense(step, seed=0) for step in range(5)):
        again, replicated_again = feedback.restart(x, x.clone())
        assert (again.keys(), replicated_again.keys()) == (new.keys(), replicated.keys())
        assert torch.equal(x, before_x)


@every_feedback
def test_state_round_trip(case: FeedbackCase) -> None:
    grads = np.random.default_rng(4).standard_normal((20, 3, 5, 7))
    unbiased = case.feedback.requires == "unbiased"
    compressor = BlockQuantize(bits=2, block=16, stochastic=True) if unbiased else ChunkTopK(k=2, chunk=16)
    whole, _ = simulate(case.feedback, compressor, grads)
    _, communicator = simulate(case.feedback, compressor, grads[:9])
    resumed = Communicator(compressor, feedback=case.feedback, exchange=Simulated(3), plan=ALL)
    resumed.load_state_dict(communicator.state_dict())
    for step, expected in zip(torch.from_numpy(grads[9:].copy()), whole[9:], strict=True):
        resumed.average_([step], ["x"])
        np.testing.assert_array_equal(step[0].numpy(), expected)


def test_econtrol_chooses_its_gain_by_the_compressor() -> None:
    assert Communicator(ChunkTopK(k=1, chunk=100), feedback=EControl()).feedback == EControl(eta=0.005)
    with pytest.warns(UserWarning, match=r"EControl: expected eta <= 0\.02, .* got eta=0\.1; larger ones can diverge"):
        Communicator(ChunkTopK(k=1, chunk=100), feedback=EControl(eta=0.1))


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [(type(case.feedback), arguments, message) for case in FEEDBACKS for arguments, message in case.errors],
)
def test_refuses(cls: type, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{cls.__name__}: expected .*{message}"):
        cls(**arguments)
