"""Error feedback does what theory says of it, on problems whose behaviour is known in closed form."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from ranks import run_ranks
from reference import feedback as reference
from reference import sparsifiers
from test_feedback import ALL, simulate, state_of
from torch import Tensor

from gradwire.comm import (
    DIANA,
    EF,
    EF21,
    EF21SGDM,
    EF21W,
    MARINA,
    Communicator,
    EControl,
    ErrorFeedback,
    NoFeedback,
    Plan,
    Simulated,
    TwoPhase,
    Warmup,
)
from gradwire.compression import BlockQuantize, ChunkTopK, Compressor, Identity, NaturalCompression


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


@pytest.mark.parametrize(
    "feedback", [EF(), EF21(), EF21W((34.5, 34.5, 34.5)), EControl(eta=0.101), EF21SGDM(eta=0.9)], ids=repr
)
def test_feedback_repairs_the_example(feedback: ErrorFeedback) -> None:
    """At EF21's largest proven step all contract like gradient descent: by 1 - lr mu a step."""
    mu = 7 / 6
    lr = EF21.max_stepsize(L=103 / 6, alpha=1 / 3, L_mean=34.5)
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


def test_econtrol_virtual_iterate_follows_exact_descent() -> None:
    """x - lr mean e moves by -lr mean g exactly, because e sums up g_i minus what was applied."""
    lr = 0.004
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    for steps in (1, 10, 300):
        x, communicator = descend(EControl(eta=0.1), TOP_1, three_workers, start, lr, steps)
        exact = start - lr * sum(three_workers(point).mean(dim=0) for point in x[:-1])
        virtual = x[-1] - lr * torch.from_numpy(state_of(communicator, "residual", (3,))).mean(dim=0)
        assert (virtual - exact).abs().max() < 1e-12


def test_econtrol_without_gain_is_ef21_to_the_bit() -> None:
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    ours, _ = descend(EControl(eta=0.0), TOP_1, three_workers, start, 0.005, 200)
    theirs, _ = descend(EF21(), TOP_1, three_workers, start, 0.005, 200)
    assert torch.equal(ours, theirs)


def test_weights_change_nothing_for_a_homogeneous_compressor_alone() -> None:
    start = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    weights = EF21W(smoothness=(1.0, 5.0, 20.0))
    plain, _ = descend(EF21(), TOP_1, three_workers, start, 0.005, 300)
    weighted, _ = descend(weights, TOP_1, three_workers, start, 0.005, 300)
    assert (plain - weighted).abs().max() < 1e-12
    plain, _ = descend(EF21(), BlockQuantize(bits=2, block=2), three_workers, start, 0.005, 20)
    weighted, _ = descend(weights, BlockQuantize(bits=2, block=2), three_workers, start, 0.005, 20)
    assert (plain - weighted).abs().max() < 1e-5  # its scales are float32
    plain, _ = descend(EF21(), NaturalCompression(), three_workers, start, 0.005, 20)
    weighted, _ = descend(weights, NaturalCompression(), three_workers, start, 0.005, 20)
    assert (plain - weighted).abs().max() > 1e-4


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


@pytest.mark.parametrize("feedback", [EF21(), EF21W(tuple(range(1, 9))), EControl(), EF21SGDM()], ids=repr)
def test_tracking_leaves_no_floor(feedback: ErrorFeedback) -> None:
    x, _ = descend(feedback, ChunkTopK(k=4, chunk=16), heterogeneous, torch.zeros(16, dtype=torch.float64), 2e-2, 3000)
    assert float(x[-1].square().sum()) < 1e-20


@pytest.mark.parametrize("feedback", [DIANA(), MARINA()], ids=repr)
def test_unbiased_tracking_leaves_no_floor(feedback: ErrorFeedback) -> None:
    """Each worker rounds on its own, so that plain compression leaves an error; omega = (sqrt(16) - 1) / 2."""
    compressor = BlockQuantize(bits=2, block=16, stochastic=True)
    omega = compressor.omega(16)
    assert omega == 1.5
    lr = type(feedback).max_stepsize(L=1.5, omega=omega, workers=8)
    start = torch.zeros(16, dtype=torch.float64)
    x, _ = descend(feedback, compressor, heterogeneous, start, lr, 700)
    assert float(x[-1].square().sum()) < 1e-16
    plain, _ = descend(NoFeedback(), compressor, heterogeneous, start, lr, 700)
    assert float(plain[-1].square().sum()) > 1


def test_ef21_on_small_batches_has_a_floor_that_momentum_and_econtrol_do_not() -> None:
    """|x|^2 / 2 in the plane with Top-1 and noise uniform on sqrt(0.3) {(2, 0), (0, 1), (-2, -1)}; 200 runs at once."""
    lr, steps, runs = 3e-3, 3000, 200
    noise = 0.3**0.5 * torch.tensor([[2.0, 0], [0, 1], [-2, -1]], dtype=torch.float64)
    floor = {}
    for feedback in (EF21(), EF21SGDM(eta=0.02), EControl(eta=0.25)):
        communicator = Communicator(ChunkTopK(k=1, chunk=2), feedback=feedback, plan=ALL)
        rng = torch.Generator().manual_seed(1)
        x = torch.zeros(runs, 2, dtype=torch.float64)
        total = 0.0
        for step in range(steps):
            grad = x + noise[torch.randint(3, (runs,), generator=rng)]
            communicator.average_([grad], ["x"])  # rows are runs
            x = x - lr * grad
            if step >= steps // 3:
                total += float(x.square().sum(dim=1).mean()) / (steps - steps // 3)
        floor[type(feedback).__name__] = total
    sgd = lr / (2 - lr) * float(noise.square().sum(dim=1).mean())
    assert floor["EControl"] == pytest.approx(sgd, rel=0.1)
    assert floor["EF21SGDM"] == pytest.approx(sgd, rel=0.2)
    assert floor["EF21"] > 3.5 * sgd


# Step sizes.


def test_step_sizes_of_the_papers() -> None:
    assert EF21.max_stepsize(L=103 / 6, alpha=1 / 3, L_mean=34.5) == pytest.approx(5.859121e-3, rel=1e-6)
    assert 1 / EF21.max_stepsize(L=1.0, alpha=1 / 68) == pytest.approx(1 + 134.5, rel=1e-3)
    half = EF21.max_stepsize(L=1.0, alpha=0.2, participation=0.5)
    assert half == EF21.max_stepsize(L=1.0, alpha=0.1) == EF21W.max_stepsize(L=1.0, alpha=0.1)
    assert EF21.max_stepsize(L=2.0, alpha=1.0) == EF.max_stepsize(L=2.0, alpha=1.0) == 0.5
    assert DIANA.max_stepsize(L=2.0, omega=0.0, workers=3) == MARINA.max_stepsize(L=2.0, omega=0.0, workers=3) == 0.5
    # MARINA with p = 1 / (1 + omega): 1 / (L (1 + omega / sqrt(n))), its corollary 2.1.
    assert MARINA.max_stepsize(L=2.0, omega=6.0, workers=9) == pytest.approx(1 / (2 * (1 + 6 / 3)))
    assert EControl.max_stepsize(L=1.0, alpha=0.1, eta=0.0) == EF21.max_stepsize(L=1.0, alpha=0.1)
    assert EF21SGDM.max_stepsize(L=1.0, alpha=0.1, eta=1.0) == EF21.max_stepsize(L=1.0, alpha=0.1)
    with_second = EF21.max_stepsize(L=1.0, alpha=0.1, second_alpha=0.1)
    assert with_second < EF21.max_stepsize(L=1.0, alpha=0.1) / 10


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EF21.max_stepsize(L=0.0, alpha=0.5), r"max_stepsize: expected L > 0, got L=0\.0"),
        (lambda: EF21.max_stepsize(L=1.0, alpha=0.0), r"expected 0 < alpha <= 1, got alpha=0\.0"),
        (lambda: EF21.max_stepsize(L=1.0, alpha=0.5, L_mean=-1.0), r"expected L_mean > 0, got L_mean=-1\.0"),
        (lambda: EF21.max_stepsize(L=1.0, alpha=0.5, participation=2.0), "expected 0 < participation <= 1"),
        (lambda: EF.max_stepsize(L=1.0, alpha=1.5), r"expected 0 < alpha <= 1, got alpha=1\.5"),
        (lambda: EControl.max_stepsize(L=1.0, alpha=0.1, eta=0.05), r"expected 0 <= eta < 0\.02705 at alpha=0\.1"),
        (lambda: EF21SGDM.max_stepsize(L=1.0, alpha=0.1, eta=0.0), "expected 0 < eta <= 1"),
        (lambda: DIANA.max_stepsize(L=1.0, omega=1.0, workers=0), "expected workers > 0, got workers=0"),
        (lambda: MARINA.max_stepsize(L=1.0, omega=1.0, workers=1, probability=0.0), "expected 0 < probability <= 1"),
    ],
)
def test_step_sizes_refuse(make: Callable[[], float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def sharp(x: Tensor) -> Tensor:
    """Four quadratics <a_i, x>^2 / 2 with a_i nearly opposite in pairs: as hard for Top-1 as can be found by search."""
    a = torch.tensor([[3.0, 1, 0.5], [-2.5, 1, 1], [0.5, -3, 1], [1, 2.5, -1]], dtype=torch.float64)
    return (a @ x)[:, None] * a


@pytest.mark.parametrize(
    ("feedback", "facts"),
    [
        (EF(), {}),
        (EF21(), {"L_mean": 9.6875}),
        (EF21SGDM(eta=0.3), {"eta": 0.3, "L_mean": 9.6875}),
        (EControl(eta=0.05), {"eta": 0.05, "L_mean": 9.6875}),
    ],
    ids=repr,
)
def test_descends_at_the_largest_proven_step(feedback: ErrorFeedback, facts: dict[str, float]) -> None:
    eigenvalues = torch.linalg.eigvalsh(torch.stack([sharp(e).mean(0) for e in torch.eye(3, dtype=torch.float64)]))
    largest, least = float(eigenvalues[-1]), float(eigenvalues[0])
    assert least > 0.1
    lr = type(feedback).max_stepsize(L=largest, alpha=1 / 3, **facts)
    x, _ = descend(feedback, TOP_1, sharp, torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64), lr, 1500)
    assert float(x[1500].norm() / x[500].norm()) < 1.2 * (1 - lr * least) ** 1000 < 0.5


# Some workers only, and both directions.


def test_partial_participation_is_ef21_where_those_absent_send_nothing() -> None:
    grads = np.random.default_rng(5).standard_normal((40, 4, 6, 8))
    communicator = Communicator(
        ChunkTopK(k=2, chunk=8), feedback=EF21(), exchange=Simulated(4), plan=ALL, participants=1
    )
    everyone = Communicator(ChunkTopK(k=2, chunk=8), feedback=EF21(), exchange=Simulated(4), plan=ALL)
    tracked, turns = np.zeros((4, 6, 8)), np.zeros(4)
    for step in grads:
        x = torch.from_numpy(step.copy())
        communicator.average_([x], ["x"])
        everyone.average_([torch.from_numpy(step.copy())], ["x"])
        local = state_of(communicator, "local", (6, 8))
        (moved,) = np.flatnonzero((local != tracked).any(axis=(1, 2)))
        tracked[moved] += sparsifiers.top_k(step[moved] - tracked[moved], k=2)
        turns[moved] += 1
        np.testing.assert_allclose(local, tracked, rtol=0, atol=1e-12)
        np.testing.assert_allclose(x[0].numpy(), tracked.mean(axis=0), rtol=0, atol=1e-12)
    assert (turns > 0).all()
    assert communicator.stats.payload_bytes * 4 == everyone.stats.payload_bytes


def test_partial_participation_costs_no_payload_in_the_long_run() -> None:
    """With half of the workers the step size is about half, so the steps are twice as many, of half the payload."""
    payload = {}
    for participants in (8, 4):
        share = participants / 8
        lr = EF21.max_stepsize(L=1.5, alpha=1 / 16, participation=share)
        communicator = Communicator(
            ChunkTopK(k=1, chunk=16), feedback=EF21(), exchange=Simulated(8), plan=ALL, participants=participants
        )
        x, steps = torch.zeros(16, dtype=torch.float64), 0
        while steps == 0 or float(x.square().sum()) > 1e-8:
            grads = heterogeneous(x)
            communicator.average_([grads], ["x"])
            x, steps = x - lr * grads[0], steps + 1
            assert steps < 5000
        payload[participants] = communicator.stats.payload_bytes
    assert payload[4] == pytest.approx(payload[8], rel=0.08)


def test_without_feedback_the_mean_is_over_those_that_take_part() -> None:
    communicator = Communicator(Identity(), exchange=Simulated(4), plan=Plan(min_ndim=2, min_numel=0), participants=2)
    counts = torch.zeros(4)
    for _ in range(300):
        matrix, vector = (
            1e3 ** torch.arange(4.0).double()[:, None, None].expand(4, 8, 8),
            torch.arange(4.0)[:, None] * 2,
        )
        grads = [matrix.clone(), vector.clone()]
        communicator.average_(grads, ["compressed", "dense"])
        present = [i for i in range(4) if int(grads[0][0, 0, 0] * 2) // 1000**i % 1000]
        assert len(present) == 2
        assert torch.equal(grads[1], torch.full((4, 1), float(sum(present))))
        counts[present] += 1
    assert ((counts - 150).abs() < 4 * (300 * 0.25) ** 0.5).all()


def test_a_dense_start_begins_at_the_exact_mean_and_counts_its_bytes() -> None:
    grads = np.random.default_rng(6).standard_normal((2, 3, 6, 8))
    estimates, communicator = simulate(EF21(dense_start=True), ChunkTopK(k=1, chunk=8), grads)
    np.testing.assert_allclose(estimates[0], grads[0].mean(axis=0), rtol=0, atol=1e-14)
    assert communicator.stats.uncompressed_bytes == 3 * 6 * 8 * 8


def test_a_dense_start_comes_after_a_warmup() -> None:
    first = Communicator(Identity(), exchange=Simulated(2), plan=ALL)
    then = Communicator(ChunkTopK(k=1, chunk=8), feedback=EF21(dense_start=True), exchange=Simulated(2), plan=ALL)
    warmup = Warmup(first, then, steps=2)
    for step in range(4):
        grads = torch.randn(2, 4, 8, dtype=torch.float64)
        mean = grads.mean(dim=0)
        warmup.average_([grads], ["x"])
        assert torch.allclose(grads[0], mean) == (step < 3)


def both_ways(grads: np.ndarray) -> np.ndarray:
    """What EF21 with `TwoPhase` makes of this rank's gradients `[steps, 6, 8]`."""
    communicator = Communicator(
        ChunkTopK(k=2, chunk=8), feedback=EF21(), exchange=TwoPhase(second=ChunkTopK(k=3, chunk=8)), plan=ALL
    )
    estimates = []
    for step in torch.from_numpy(grads[:, torch.distributed.get_rank()].copy()):
        communicator.average_([step], ["x"])
        estimates.append(step.numpy())
    return np.stack(estimates)


@pytest.mark.slow
def test_ef21_with_two_phases_is_the_bidirectional_algorithm() -> None:
    grads = np.random.default_rng(7).standard_normal((25, 2, 6, 8))
    first, second = run_ranks(2, both_ways, grads)
    expected = reference.ef21_bc(grads, lambda x: sparsifiers.top_k(x, k=2), lambda x: sparsifiers.top_k(x, k=3))
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_thousand_workers_in_one_process() -> None:
    communicator = Communicator(ChunkTopK(k=10, chunk=1000), feedback=EF21(), exchange=Simulated(1000), plan=ALL)
    optimum = torch.randn(1000, 1).expand(1000, 100_000)  # workers differ
    x = torch.zeros(100_000)
    for _ in range(2):
        grads = x - optimum
        communicator.average_([grads], ["x"])
        x = x - grads[0]
    kept = communicator.state_rows()
    assert [rows.shape for key, rows in kept.items() if key.startswith("local")] == [(1000, 100, 1000)]
    assert communicator.stats.payload_bytes == 2 * 1000 * ChunkTopK(k=10, chunk=1000).payload_bytes((100_000,), x.dtype)
    assert ((x != 0).sum() == 2 * 10 * 100).item()
