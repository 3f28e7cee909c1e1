"""PowerSGD equals the paper in float64, spans what Gram-Schmidt spans, and survives gradients of any rank."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from reference.powersgd import gram_schmidt, powersgd
from threads import Thread, on_threads
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from gradwire.comm import Plan, PowerSGD
from gradwire.comm.orthogonalize import cholesky_qr, newton_schulz

both = pytest.mark.parametrize("orthogonalization", ["cholesky", "newton_schulz"])


def low_rank(rank: int, m: int = 48, n: int = 64, batch: int = 1) -> Tensor:
    return torch.randn(batch, m, rank) @ torch.randn(batch, rank, n)


# The algorithm.


@both
@pytest.mark.parametrize("n", [1, 3])
def test_equals_reference(orthogonalization: str, n: int) -> None:
    """Two matrices of one shape (one batch), one of another, and a vector, over several steps."""
    shapes = {"a": (40, 32), "b": (40, 32), "conv": (24, 8, 3, 3)}
    rng = np.random.default_rng(0)
    grads = {name: rng.standard_normal((8, n, *shape)) for name, shape in shapes.items()}
    grads["bias"] = rng.standard_normal((8, n, 32))
    shapes["bias"] = (32,)
    updates = {name: np.zeros((8, n, *shape)) for name, shape in shapes.items()}
    first: dict[str, Tensor] = {}
    last: list[dict[str, Tensor]] = [{}] * n

    def work(rank: int, collectives: Thread) -> None:
        communicator = PowerSGD(3, orthogonalization=orthogonalization, min_compression_rate=1.0)
        communicator.join(collectives)  # type: ignore[arg-type]
        communicator.prepare(list(shapes), [torch.from_numpy(grads[name][0, 0]) for name in shapes])
        if rank == 0:
            first.update({key: value.clone() for key, value in communicator.state_rows().items()})
        for step in range(8):
            tensors = [torch.from_numpy(grads[name][step, rank].copy()) for name in shapes]
            communicator.average_(tensors, list(shapes))
            for name, tensor in zip(shapes, tensors, strict=True):
                updates[name][step, rank] = tensor.numpy()
        last[rank] = communicator.state_rows()

    on_threads(n, work)
    assert {key.split("/")[1] for key in first} == {"a", "b", "conv"}
    for name, shape in shapes.items():
        for rank in range(n):
            np.testing.assert_array_equal(updates[name][:, rank], updates[name][:, 0])
        if name == "bias":
            np.testing.assert_allclose(updates[name][:, 0], grads[name].mean(axis=1), rtol=1e-14, atol=1e-15)
            continue
        m, k = shape[0], int(np.prod(shape[1:]))
        expected, error, q = powersgd(grads[name].reshape(8, n, m, k), first[f"q/{name}/0:{k}"][0].numpy())
        tolerance = {"rtol": 0, "atol": 1e-8 if orthogonalization == "cholesky" else 1e-4}
        np.testing.assert_allclose(updates[name][:, 0].reshape(8, m, k), expected, **tolerance)
        for rank in range(n):
            np.testing.assert_allclose(last[rank][f"residual/{name}/0:{m}"][0].numpy(), error[rank], **tolerance)
            found = last[rank][f"q/{name}/0:{k}"][0].numpy()
            np.testing.assert_allclose(np.linalg.norm(found, axis=0), 1, rtol=1e-12)
            np.testing.assert_allclose(projector(found), projector(q), **tolerance)


def projector(columns: np.ndarray) -> np.ndarray:
    basis, _ = np.linalg.qr(columns)
    return basis @ basis.T


@both
def test_conserves(orthogonalization: str) -> None:
    """What was sent plus what is kept is what came in."""
    communicator = PowerSGD(2, orthogonalization=orthogonalization)
    came = sent = torch.zeros(48, 64, dtype=torch.float64)
    for _ in range(30):
        grad = torch.randn(48, 64, dtype=torch.float64)
        came = came + grad
        communicator.average_([grad], ["w"])
        sent = sent + grad
    residual = communicator.state_rows()["residual/w/0:48"][0]
    assert communicator.stats.residual_norm == pytest.approx(float(residual.norm()), rel=1e-12)
    assert float((came - sent).norm()) > 1
    torch.testing.assert_close(sent + residual, came, rtol=0, atol=1e-10)


@both
def test_exact_for_gradients_of_that_rank(orthogonalization: str) -> None:
    """A second step finds the column space that the first one tracked."""
    communicator = PowerSGD(4, orthogonalization=orthogonalization)
    (expected,) = low_rank(3)
    for _ in range(3):
        grad = expected.clone()
        communicator.average_([grad], ["w"])
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)


@both
@pytest.mark.parametrize("start", [0, 1])
def test_recovers_from_gradients_of_lower_rank(orthogonalization: str, start: int) -> None:
    """Zeros (an unused layer) or rank one at first must not leave Q at a lower rank for good."""
    communicator = PowerSGD(2, orthogonalization=orthogonalization)
    (expected,), (poor,) = low_rank(2), low_rank(1)
    for _ in range(5):
        communicator.average_([poor.clone() * start], ["w"])
    for _ in range(6):
        grad = expected.clone()
        communicator.average_([grad], ["w"])
    torch.testing.assert_close(grad, expected, rtol=1e-3, atol=1e-3)
    assert communicator.stats.residual_norm < 1e-2


@both
def test_zero_gradients_stay_zero(orthogonalization: str) -> None:
    communicator = PowerSGD(2, orthogonalization=orthogonalization)
    for _ in range(3):
        grad = torch.zeros(48, 64)
        communicator.average_([grad], ["w"])
        assert not grad.any()
    assert communicator.stats.skipped == 0
    assert all(rows.isfinite().all() for rows in communicator.state_rows().values())


@both
@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_scale_does_not_matter(orthogonalization: str, scale: float) -> None:
    plain, scaled = (PowerSGD(2, orthogonalization=orthogonalization) for _ in range(2))
    for _ in range(4):
        grad = torch.randn(48, 64)
        other = grad * scale
        plain.average_([grad], ["w"])
        scaled.average_([other], ["w"])
        torch.testing.assert_close(other / scale, grad, rtol=1e-3, atol=1e-3)


# What is sent dense.


@pytest.mark.parametrize(
    ("shape", "options", "dense"),
    [
        ((64, 64), {}, False),  # rate 64 * 64 / (4 * 128) = 8
        ((64, 64), {"min_compression_rate": 8.0}, False),
        ((64, 64), {"min_compression_rate": 8.1}, True),
        ((64, 64), {"matrix_rank": 16}, False),
        ((64, 64), {"matrix_rank": 17}, True),
        ((4096,), {}, True),
        ((), {}, True),
        ((30, 30), {}, True),  # the plan's 1024 entries
        ((30, 30), {"plan": Plan(min_numel=0)}, False),
        ((64, 64), {"plan": Plan(dense=("w",))}, True),
        ((4096,), {"plan": Plan(compress=("w",))}, True),  # a vector has no low rank
        ((16, 16, 4), {}, False),
    ],
)
def test_dense(shape: tuple[int, ...], options: dict[str, object], dense: bool) -> None:
    communicator = PowerSGD(**options)  # type: ignore[arg-type]
    grad = torch.randn(shape)
    expected = grad.clone()
    communicator.average_([grad, torch.zeros(0, 3)], ["w", "empty"])
    assert torch.equal(grad, expected) == dense
    assert (communicator.state_rows() == {}) == dense


def test_nothing_but_empty_tensors() -> None:
    communicator = PowerSGD()
    communicator.average_([torch.zeros(0, 3)], ["empty"])
    assert communicator.found_inf == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"matrix_rank": 0}, "matrix_rank >= 1, got matrix_rank=0"),
        ({"min_compression_rate": 0.0}, "min_compression_rate > 0, got min_compression_rate=0.0"),
        ({"orthogonalization": "qr"}, "'cholesky' or 'newton_schulz', got orthogonalization='qr'"),
    ],
)
def test_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"PowerSGD: expected .*{message}"):
        PowerSGD(**options)  # type: ignore[arg-type]


# Orthogonalisation.


@pytest.mark.parametrize("orthonormal", [cholesky_qr, newton_schulz])
@pytest.mark.parametrize("r", [1, 2, 5])
def test_same_subspace_as_gram_schmidt(orthonormal: Callable[[Tensor], Tensor], r: int) -> None:
    p = torch.randn(3, 40, r)
    reference = p.clone()
    powerSGD_hook._orthogonalize(reference)
    basis = orthonormal(p)
    eye = torch.eye(r).expand(3, r, r)
    torch.testing.assert_close(basis.mT @ basis, eye, rtol=0, atol=1e-4)
    torch.testing.assert_close(basis @ basis.mT, reference @ reference.mT, rtol=0, atol=1e-4)
    ours = np.stack([gram_schmidt(matrix) for matrix in p.double().numpy()])
    np.testing.assert_allclose(np.abs(ours), reference.abs().numpy(), atol=1e-4)


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_cholesky_of_badly_conditioned_columns(condition: float) -> None:
    u, v = torch.linalg.qr(torch.randn(2, 200, 4))[0], torch.linalg.qr(torch.randn(2, 4, 4))[0]
    p = u * torch.logspace(0, -np.log10(condition), 4) @ v
    basis = cholesky_qr(p)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(4).expand(2, 4, 4), rtol=0, atol=1e-5)
    torch.testing.assert_close(basis @ (basis.mT @ p), p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("orthonormal", [cholesky_qr, newton_schulz])
@pytest.mark.parametrize("r", [2, 8, 32])
@pytest.mark.parametrize("noise", [0, 1e-7, 1e-5, 1e-3])
@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_dependent_columns_do_no_harm(
    orthonormal: Callable[[Tensor], Tensor], r: int, noise: float, scale: float
) -> None:
    """No column longer than one, however dependent they are, and the dominant direction is there."""
    p = scale * (low_rank(1, 500, r) + noise * torch.randn(1, 500, r))
    basis = orthonormal(p)
    assert torch.linalg.matrix_norm(basis.double(), 2) < 1 + 1e-5
    torch.testing.assert_close(basis @ (basis.mT @ p) / scale, p / scale, rtol=0, atol=0.05)


@pytest.mark.parametrize("orthonormal", [cholesky_qr, newton_schulz])
def test_zero_matrices_in_a_batch(orthonormal: Callable[[Tensor], Tensor]) -> None:
    p = torch.randn(3, 20, 2)
    p[1] = 0
    basis = orthonormal(p)
    assert not basis[1].any()
    torch.testing.assert_close(basis[::2].mT @ basis[::2], torch.eye(2).expand(2, 2, 2), rtol=0, atol=1e-4)
