"""MASHA1 and MASHA2 equal the published algorithms, keep what theory proves, and leave nothing half done."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from reference import masha as reference
from reference import sparsifiers
from torch import Tensor, nn

from gradwire.bench import specs
from gradwire.bench.theory import saddle
from gradwire.comm import AllGather, CheckpointError, Communicator, NoFeedback, Plan, Simulated, TwoPhase
from gradwire.comm.participation import Cohort
from gradwire.compression import (
    BlockQuantize,
    Cast,
    ChunkTopK,
    Compressor,
    Identity,
    RandomK,
    ScaledSign,
    TopK,
    counter_rng,
)
from gradwire.optim import MASHA1, MASHA2
from gradwire.optim.masha import MASHA

Array = NDArray[np.float64]
ALL = Plan(min_ndim=0, min_numel=0)
TOP, RANDOM = ChunkTopK(k=2, chunk=8), RandomK(k=2, chunk=8)
STEPS, N = 60, 3
both = pytest.mark.parametrize("cls", [MASHA1, MASHA2])


class Saddle:
    """x'A_m y + a_m'x + b_m'y + mu/2 |x|^2 - mu/2 |y|^2 for each worker m, x and y of d entries; and mini-batches.

    A batch adds its own noise to A_m: what holds for one evaluation holds for all of a step.
    """

    def __init__(self, workers: int = N, d: int = 16, mu: float = 0.1, noise: float = 0.0, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.A = rng.standard_normal((workers, d, d)) / math.sqrt(d)
        self.a, self.b = rng.standard_normal((2, workers, d))
        self.mu, self.noise, self.d = mu, noise, d

    def matrices(self, step: int | None) -> Array:
        """Of the whole data, or of this step's batch."""
        if step is None or self.noise == 0:
            return self.A
        return self.A + self.noise * np.random.default_rng(1000 + step).standard_normal(self.A.shape)

    def operator(self, z: Array, step: int | None) -> Array:
        """F_m(z) of every worker, [M, 2d]."""
        x, y, A = z[: self.d], z[self.d :], self.matrices(step)
        return np.concatenate([A @ y + self.a + self.mu * x, -(x @ A) - self.b + self.mu * y], axis=1)

    def losses(self, x: Tensor, y: Tensor, step: int | None) -> Tensor:
        """Of every worker, [M]."""
        A, a, b = (torch.from_numpy(value).to(x.dtype) for value in (self.matrices(step), self.a, self.b))
        return (A @ y + a) @ x + b @ y + self.mu / 2 * (x.square().sum() - y.square().sum())

    def solution(self) -> Array:
        eye = np.eye(2 * self.d)
        start = self.operator(np.zeros(2 * self.d), None).mean(axis=0)
        linear = np.stack([self.operator(e, None).mean(axis=0) - start for e in eye], axis=1)
        return np.linalg.solve(linear, -start)

    def smoothness(self) -> Array:
        """Lipschitz constant of each worker's operator."""
        return np.array([math.hypot(np.linalg.norm(A, 2), self.mu) for A in self.A])


START = np.random.default_rng(5).standard_normal(32)


def players(z: Array = START, dtype: torch.dtype = torch.float64) -> tuple[nn.Parameter, nn.Parameter]:
    x, y = np.split(z, 2)
    return nn.Parameter(torch.from_numpy(x.copy()).to(dtype)), nn.Parameter(torch.from_numpy(y.copy()).to(dtype))


def groups(x: nn.Parameter, y: nn.Parameter, **second: Any) -> list[dict[str, Any]]:
    return [{"params": [("x", x)]}, {"params": [("y", y)], "maximize": True, **second}]


def point(x: Tensor, y: Tensor) -> Array:
    return torch.cat([x, y]).detach().to(torch.float64).numpy()


def simulated(cls: type[MASHA], problem: Saddle, lr: float, compressor: Compressor, **options: Any) -> tuple[Any, ...]:
    x, y = players()
    exchange = Simulated(len(problem.A))
    return cls(groups(x, y), lr, compressor=compressor, exchange=exchange, plan=ALL, **options), x, y


def run(optimizer: MASHA, x: Tensor, y: Tensor, problem: Saddle, steps: int, full: bool = False) -> list[Array]:
    """All iterates."""
    iterates = [point(x, y)]
    for step in range(steps):
        optimizer.step(
            lambda step=step: problem.losses(x, y, step),
            full_closure=(lambda: problem.losses(x, y, None)) if full else None,
        )
        iterates.append(point(x, y))
    return iterates


def per_player(compress: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A map on rows of one tensor, on the two tensors of one vector."""
    return lambda p: np.concatenate([compress(half.reshape(-1, 8)).ravel() for half in np.split(p, 2)])


TOP_K = per_player(lambda rows: sparsifiers.top_k(rows, k=2))


def through(compressor: Compressor, seed: int = 0, **options: Any) -> Callable[[Array, int], Array]:
    """What a communicator alone makes of the workers' vectors."""
    communicator = Communicator(compressor, exchange=Simulated(N), plan=ALL, seed=seed, **options)

    def send(differences: Array, step: int) -> Array:
        halves = [torch.from_numpy(half.copy()) for half in np.split(differences, 2, axis=1)]
        communicator.average_(halves, ["x", "y"])
        return np.concatenate([half[0].numpy() for half in halves])

    return send


# The published algorithms.


@pytest.mark.parametrize("seed", [0, 3])
def test_masha1_equals_the_published_algorithm(seed: int) -> None:
    problem = Saddle(noise=0.2)
    optimizer, x, y = simulated(MASHA1, problem, 0.1, RANDOM, seed=seed)
    assert optimizer.tau == 1 - 2 / 8
    moves = [reference.coin(seed, step, 0.75) for step in range(1, STEPS + 1)]
    assert 5 < sum(moves) < 25
    expected = reference.masha1(
        START, problem.operator, lambda z, _: problem.operator(z, None), 0.1, 0.75, moves, through(RANDOM, seed)
    )
    np.testing.assert_allclose(run(optimizer, x, y, problem, STEPS, full=True), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tau", [None, 0.5])
def test_masha2_equals_the_published_algorithm(tau: float | None) -> None:
    problem = Saddle(noise=0.2)
    optimizer, x, y = simulated(MASHA2, problem, 0.1, TOP, tau=tau)
    assert optimizer.tau == (0.75 if tau is None else tau)
    moves = [reference.coin(0, step, optimizer.tau) for step in range(1, STEPS + 1)]
    expected = reference.masha2(
        START, problem.operator, lambda z, _: problem.operator(z, None), 0.1, optimizer.tau, moves, TOP_K
    )
    np.testing.assert_allclose(run(optimizer, x, y, problem, STEPS, full=True), expected, rtol=1e-10, atol=1e-12)


def test_without_a_full_closure_the_step_s_own_batch_serves() -> None:
    """w moves at the beginning of the next step, and is evaluated on that step's data."""
    problem = Saddle(noise=0.2)
    optimizer, x, y = simulated(MASHA2, problem, 0.1, TOP)
    moves = [reference.coin(0, step, 0.75) for step in range(1, STEPS + 1)]
    expected = reference.masha2(START, problem.operator, problem.operator, 0.1, 0.75, moves, TOP_K)
    np.testing.assert_allclose(run(optimizer, x, y, problem, STEPS), expected, rtol=1e-10, atol=1e-12)


def test_players_have_step_sizes_and_constraints_of_their_own() -> None:
    problem = Saddle()
    x, y = players()
    boxes = groups(x, y, lr=0.03, prox=lambda tensor, lr: tensor.clamp_(-0.5, 0.5))
    optimizer = MASHA1(boxes, 0.1, compressor=RANDOM, exchange=Simulated(N), plan=ALL)
    lr = np.repeat([0.1, 0.03], 16)
    moves = [reference.coin(0, step, 0.75) for step in range(1, STEPS + 1)]

    def box(z: Array) -> Array:
        return np.concatenate([z[:16], np.clip(z[16:], -0.5, 0.5)])

    expected = reference.masha1(START, problem.operator, problem.operator, lr, 0.75, moves, through(RANDOM), box)
    iterates = run(optimizer, x, y, problem, STEPS)
    np.testing.assert_allclose(iterates, expected, rtol=1e-10, atol=1e-12)
    assert (np.abs(iterates[-1][16:]) == 0.5).any()
    torch.save(optimizer.state_dict(), io.BytesIO())  # no function is part of it


def test_a_proximal_operator_of_all_groups_sees_the_step_size() -> None:
    """Soft thresholding: the zero of F + d|z|_1, checked by its optimality condition."""
    problem, threshold = Saddle(workers=1, mu=1.0), 0.7
    x, y = players()

    def shrink(tensor: Tensor, lr: float) -> None:
        tensor.copy_(tensor.sign() * (tensor.abs() - lr * threshold).clamp(min=0))

    optimizer = MASHA1(groups(x, y), 0.2, compressor=RANDOM, plan=ALL, prox=shrink)
    for _ in range(600):
        optimizer.step(lambda: problem.losses(x, y, None)[0])
    z = point(x, y)
    operator = problem.operator(z, None)[0]
    zero = z == 0
    assert 3 < zero.sum() < 29
    np.testing.assert_allclose(operator[~zero], -threshold * np.sign(z[~zero]), atol=1e-8)
    assert (np.abs(operator[zero]) <= threshold + 1e-8).all()


@both
def test_without_compression_it_is_extragradient(cls: type[MASHA]) -> None:
    problem = Saddle()
    optimizer, x, y = simulated(cls, problem, 0.2, Identity())
    assert optimizer.tau == 0
    z, expected = START, [START]
    for _ in range(STEPS):
        half = z - 0.2 * problem.operator(z, None).mean(axis=0)
        z = z - 0.2 * problem.operator(half, None).mean(axis=0)
        expected.append(z)
    np.testing.assert_allclose(run(optimizer, x, y, problem, STEPS), expected, rtol=1e-10, atol=1e-12)


def test_participants_are_averaged_and_dense_evaluations_are_of_all() -> None:
    problem = Saddle(noise=0.2)
    optimizer, x, y = simulated(MASHA1, problem, 0.1, Identity(), participants=2, tau=0.75)
    moves = [reference.coin(0, step, 0.75) for step in range(1, STEPS + 1)]
    seen = set()

    def send(differences: Array, step: int) -> Array:
        key = counter_rng.fold("cohort", 0, step)
        present = Cohort.draw(key, 2, N, 0, N, torch.device("cpu")).present.numpy()
        seen.add(tuple(present))
        return differences[present].mean(axis=0)

    expected = reference.masha1(START, problem.operator, lambda z, _: problem.operator(z, None), 0.1, 0.75, moves, send)
    np.testing.assert_allclose(run(optimizer, x, y, problem, STEPS, full=True), expected, rtol=1e-10, atol=1e-12)
    assert len(seen) == 3


# What theory says.


def distances(iterates: list[Array], solution: Array) -> Array:
    return np.square(np.stack(iterates) - solution).sum(axis=1)


@pytest.mark.parametrize(
    ("compressor", "independent", "participants"),
    [
        (RandomK(k=2, chunk=8), False, None),
        (BlockQuantize(bits=2, block=8, stochastic=True), True, None),
        (Identity(), True, 2),
    ],
    ids=repr,
)
def test_contracts_as_proven(compressor: Compressor, independent: bool, participants: int | None) -> None:
    """At the largest proven step size tau |z - z*|^2 + |w - z*|^2 shrinks as it should, in the mean of a run."""
    problem = Saddle(workers=4, mu=0.3)
    omega = compressor.omega(16)
    assert omega is not None
    L = float(np.sqrt(np.mean(problem.smoothness() ** 2)))
    tau = 0.75
    workers = (participants or 4) if independent else 1
    lr = MASHA1.max_stepsize(L=L, omega=omega, workers=workers, tau=tau, mu=0.3)
    optimizer, x, y = simulated(MASHA1, problem, lr, compressor, tau=tau, participants=participants, full_batch=True)
    solution = problem.solution()
    values = []
    for _ in range(250):
        optimizer.step(lambda: problem.losses(x, y, None))
        w = torch.cat([optimizer.state[p]["snapshot"] for p in (x, y)]).numpy()
        values.append(tau * np.square(point(x, y) - solution).sum() + np.square(w - solution).sum())
    assert values[-1] > 1e-24  # far from rounding
    factor = (values[-1] / values[0]) ** (1 / (len(values) - 1))
    assert factor <= 1 - lr * 0.3 / 2


@both
def test_mini_batches_leave_no_floor_if_w_sees_all_data(cls: type[MASHA]) -> None:
    problem = Saddle(mu=0.5, noise=0.1)
    errors = []
    for full in (True, False):
        optimizer, x, y = simulated(cls, problem, 0.3, RANDOM if cls is MASHA1 else TOP)
        errors.append(distances(run(optimizer, x, y, problem, 160, full=full), problem.solution()))
    assert errors[0][-1] < 1e-8 * errors[0][0]
    assert errors[1][-50:].min() > 1e-5 * errors[1][0]


class WithoutResiduals(MASHA):
    """MASHA2 that forgets."""

    scales_first = True

    def __init__(self, params: Any, lr: float, *, compressor: Compressor, exchange: Any, plan: Plan) -> None:
        communication: dict[str, Any] = {"second": None, "exchange": exchange, "plan": plan}
        super().__init__(params, lr, compressor, NoFeedback(), tau=None, full_batch=True, **communication)

    @classmethod
    def kept(cls, compressor: Compressor, numel: int) -> float:
        return compressor.contraction(numel) or 1.0


def test_top_k_needs_residuals() -> None:
    problem, steps = Saddle(), 400
    top_1 = TopK(ratio=1 / 16)
    lr = MASHA2.suggested_stepsize(L=float(problem.smoothness().max()), alpha=1 / 16, c=1.0)
    start = distances([START], problem.solution())[0]

    optimizer, x, y = simulated(MASHA2, problem, lr, top_1, full_batch=True)
    assert distances(run(optimizer, x, y, problem, steps), problem.solution())[-1] < 0.05 * start
    forgetful, x, y = simulated(WithoutResiduals, problem, lr, top_1)
    assert distances(run(forgetful, x, y, problem, steps), problem.solution())[-1] > 1e2 * start


def test_compressed_extragradient_stalls() -> None:
    """Without w, what is compressed does not vanish at the solution, and top-1 loses most of it."""
    problem = Saddle()
    send = Communicator(TopK(ratio=1 / 16), exchange=Simulated(N), plan=ALL)
    lr = MASHA2.suggested_stepsize(L=float(problem.smoothness().max()), alpha=1 / 16, c=0.5)
    z, errors = START, []
    for _ in range(250):
        point = z
        for _ in range(2):
            halves = [torch.from_numpy(F.copy()) for F in np.split(problem.operator(point, None), 2, axis=1)]
            send.average_(halves, ["x", "y"])
            point = z - lr * np.concatenate([half[0].numpy() for half in halves])
        z = point
        errors.append(distances([z], problem.solution())[0])
    assert errors[-1] > 0.5 * distances([START], problem.solution())[0]


def test_step_sizes() -> None:
    assert MASHA1.max_stepsize(L=2.0, omega=9.0, workers=1) == pytest.approx(math.sqrt(0.1) / (2 * 2 * math.sqrt(10)))
    assert MASHA1.max_stepsize(L=2.0, omega=9.0, workers=9, tau=0.5, second_omega=1.0) == pytest.approx(
        math.sqrt(0.5) / (2 * 2 * math.sqrt(2 * 2))
    )
    assert MASHA1.max_stepsize(L=1.0, omega=0.0, workers=3) == 0.5
    assert MASHA1.max_stepsize(L=1.0, omega=9.0, workers=1, mu=10.0) == pytest.approx(0.1 / 20)
    assert MASHA2.suggested_stepsize(L=2.0, alpha=0.04) == pytest.approx(0.25 * 0.2 / 2)
    assert MASHA2.suggested_stepsize(L=2.0, alpha=0.04, tau=0.0, c=0.5) == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (MASHA1.max_stepsize, {"L": 0.0, "omega": 1.0, "workers": 1}, r"expected L > 0, got L=0\.0"),
        (MASHA1.max_stepsize, {"L": 1.0, "omega": -1.0, "workers": 1}, r"expected 0 <= omega, got omega=-1\.0"),
        (MASHA1.max_stepsize, {"L": 1.0, "omega": 1.0, "workers": 0}, "expected workers > 0, got workers=0"),
        (MASHA1.max_stepsize, {"L": 1.0, "omega": 1.0, "workers": 1, "tau": 1.0}, r"0 <= tau < 1, got tau=1\.0"),
        (MASHA2.suggested_stepsize, {"L": 1.0, "alpha": 0.0}, r"expected alpha > 0, got alpha=0\.0"),
        (MASHA2.suggested_stepsize, {"L": 1.0, "alpha": 0.1, "tau": -1.0}, r"expected 0 <= tau < 1, got tau=-1\.0"),
    ],
)
def test_step_sizes_are_checked(function: Callable[..., float], arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**arguments)


# What is evaluated.


def count(optimizer: MASHA, x: Tensor, y: Tensor, problem: Saddle, steps: int, full: bool = False) -> tuple[int, int]:
    calls = [0, 0]

    def evaluate(which: int) -> Tensor:
        calls[which] += 1
        return problem.losses(x, y, None)

    for _ in range(steps):
        optimizer.step(lambda: evaluate(0), full_closure=(lambda: evaluate(1)) if full else None)
    return calls[0], calls[1]


def test_evaluations() -> None:
    problem = Saddle()
    moves = 1 + sum(reference.coin(0, step, 0.75) for step in range(1, 40))
    assert count(*simulated(MASHA1, problem, 0.1, RANDOM), problem, 40) == (80, 0)  # at w once, moved or not
    assert count(*simulated(MASHA1, problem, 0.1, RANDOM), problem, 40, full=True) == (80, moves)
    assert count(*simulated(MASHA1, problem, 0.1, RANDOM, full_batch=True), problem, 40) == (40 + moves, 0)


@both
def test_full_batch_changes_nothing_else(cls: type[MASHA]) -> None:
    problem, compressor = Saddle(), RANDOM if cls is MASHA1 else TOP
    twice = run(*simulated(cls, problem, 0.1, compressor), problem, 40)
    once = run(*simulated(cls, problem, 0.1, compressor, full_batch=True), problem, 40)
    np.testing.assert_array_equal(twice, once)


def test_closures_may_call_backward_themselves() -> None:
    results = []
    for backward in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(40, 30)
        shift = nn.Parameter(torch.zeros(40))
        optimizer = MASHA2(
            [{"params": model.named_parameters()}, {"params": [("shift", shift)], "maximize": True}],
            torch.tensor(0.1),
            compressor=TOP,
        )
        inputs = torch.randn(8, 40)

        def loss(model: nn.Module = model, inputs: Tensor = inputs, shift: Tensor = shift) -> Tensor:
            return model(inputs + shift).square().mean() - shift.square().sum()

        def with_backward(loss: Callable[[], Tensor] = loss) -> Tensor:
            value = loss()
            value.backward()
            return value

        losses = [optimizer.step(with_backward if backward else loss) for _ in range(5)]
        assert not any(loss.requires_grad for loss in losses)
        assert all(p.grad is None for p in (*model.parameters(), shift))
        results.append([*model.parameters(), shift])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert results[0][-1].abs().max() > 0


def test_parameters_without_gradient() -> None:
    """One that requires none is left out; one that the loss does not use takes part with zero, and stays."""
    x, frozen, unused = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4), requires_grad=False), torch.ones(3)
    unused = nn.Parameter(unused)
    optimizer = MASHA1([x, frozen, unused], lr=0.1)
    assert set(optimizer.state) == {x, unused}
    optimizer.step(lambda: (x * frozen).square().sum())
    assert x[0] < 1
    assert torch.equal(frozen, torch.ones(4))
    assert torch.equal(unused, torch.ones(3))


def test_a_group_that_is_added_takes_part() -> None:
    """As if it had been there with a snapshot at its own point: the next step takes one."""
    x, y = nn.Parameter(torch.ones(8)), nn.Parameter(torch.ones(8))
    optimizer = MASHA1([x], lr=0.3, compressor=RANDOM, plan=ALL, full_batch=True)
    for _ in range(3):
        optimizer.step(lambda: x.square().sum())
    optimizer.add_param_group({"params": [y], "maximize": True})
    for _ in range(300):
        optimizer.step(lambda: 0.1 * (x.square().sum() - y.square().sum()) + x @ y)
    assert max(x.abs().max(), y.abs().max()) < 1e-3


# Nothing half done.


@both
@pytest.mark.parametrize("when", [0, 6, 7, 8])
@pytest.mark.parametrize("where", ["closure", "full_closure"])
def test_a_gradient_that_is_not_finite_is_skipped(cls: type[MASHA], when: int, where: str) -> None:
    problem, compressor = Saddle(mu=0.5), RANDOM if cls is MASHA1 else TOP
    optimizer, x, y = simulated(cls, problem, 0.3, compressor)
    poisoned = torch.ones(N)
    poisoned[1] = torch.inf
    skipped = 0
    for step in range(80):
        before = point(x, y)
        evaluated = set()

        def closure(name: str, step: int = step, evaluated: set[str] = evaluated) -> Tensor:
            evaluated.add(name)
            losses = problem.losses(x, y, None)
            return losses * poisoned if step == when and name == where else losses

        optimizer.step(lambda f=closure: f("closure"), full_closure=lambda f=closure: f("full_closure"))
        if step == when and where in evaluated:
            skipped += 1
            np.testing.assert_array_equal(point(x, y), before)
        for state in optimizer.state.values():
            assert all(value.isfinite().all() for value in state.values())
    assert optimizer.communicator.stats.skipped == skipped
    assert skipped == 1 or where == "full_closure"
    assert distances([point(x, y)], problem.solution())[0] < 1e-3 * distances([START], problem.solution())[0]


def test_a_first_step_that_is_skipped_is_taken_anew() -> None:
    problem = Saddle()
    optimizer, x, y = simulated(MASHA1, problem, 0.1, RANDOM)
    optimizer.step(lambda: problem.losses(x, y, None) * torch.nan)
    np.testing.assert_array_equal(point(x, y), START)
    assert optimizer.state[x]["step"] == 0
    optimizer.step(lambda: problem.losses(x, y, None))
    assert optimizer.state[x]["step"] == 1
    np.testing.assert_allclose(
        optimizer.state[x]["snapshot_operator"].numpy(), problem.operator(START, None).mean(axis=0)[:16], rtol=1e-12
    )


@pytest.mark.parametrize("call", [0, 1, 2])
def test_an_error_in_a_closure_leaves_parameters_at_rest(call: int) -> None:
    problem = Saddle()
    optimizer, x, y = simulated(MASHA1, problem, 0.1, RANDOM)
    run(optimizer, x, y, problem, 5)
    optimizer.add_param_group({"params": [("another", nn.Parameter(torch.ones(1)))]})  # so that w moves: three calls
    before, calls = point(x, y), iter(range(3))

    def closure() -> Tensor:
        if next(calls) == call:
            raise RuntimeError("out of data")
        return problem.losses(x, y, None)

    with pytest.raises(RuntimeError, match="out of data"):
        optimizer.step(closure, full_closure=closure)
    np.testing.assert_array_equal(point(x, y), before)


# State.


@both
@pytest.mark.parametrize("full_batch", [False, True])
def test_resumes_bit_for_bit(cls: type[MASHA], full_batch: bool) -> None:
    problem = Saddle(noise=0.0 if full_batch else 0.2)
    options: dict[str, Any] = {"compressor": RANDOM if cls is MASHA1 else TOP, "full_batch": full_batch}
    whole, x, y = simulated(cls, problem, 0.1, **options)
    run(whole, x, y, problem, 23)
    saved = io.BytesIO()
    torch.save(whole.state_dict(), saved)
    saved.seek(0)
    resumed, u, v = simulated(cls, problem, 0.7, **options)
    with torch.no_grad():
        u.copy_(x)
        v.copy_(y)
    loaded = torch.load(saved, weights_only=True)
    resumed.load_state_dict(loaded)
    assert resumed.param_groups[0]["lr"] == 0.1
    untouched = {key: {name: t.clone() for name, t in state.items()} for key, state in loaded["state"].items()}
    np.testing.assert_array_equal(run(resumed, u, v, problem, 30), run(whole, x, y, problem, 30))
    for key, state in loaded["state"].items():
        assert all(torch.equal(value, untouched[key][name]) for name, value in state.items())


def test_state_keeps_its_dtype() -> None:
    """A bfloat16 model's operator is kept in float32, also through a load."""
    x = nn.Parameter(torch.linspace(0, 1, 8, dtype=torch.bfloat16))
    optimizer = MASHA1([x], lr=0.01, compressor=RANDOM, plan=ALL)
    for _ in range(3):
        optimizer.step(lambda: (x * math.pi).square().sum())
    again = MASHA1([nn.Parameter(x.detach().clone())], lr=0.01, compressor=RANDOM, plan=ALL)
    again.load_state_dict(optimizer.state_dict())
    (state,) = again.state.values()
    assert (state["snapshot"].dtype, state["snapshot_operator"].dtype) == (torch.bfloat16, torch.float32)
    for name, value in state.items():
        assert torch.equal(value, optimizer.state[x][name])


def test_refuses_states_of_others() -> None:
    x = nn.Parameter(torch.ones(8))
    sgd = torch.optim.SGD([x], lr=0.1, momentum=0.9)
    x.square().sum().backward()
    sgd.step()
    with pytest.raises(ValueError, match=r"MASHA1: expected a state of \['step', .* got \['momentum_buffer'\]"):
        MASHA1([x], lr=0.1).load_state_dict(sgd.state_dict())
    optimizer = MASHA1([x], lr=0.1)
    optimizer.step(lambda: x.square().sum())
    state = optimizer.state_dict()
    del state["communicator"]
    other = MASHA1([x], lr=0.1)
    other.load_state_dict(state)
    with pytest.raises(CheckpointError, match="expected the communicator's state with the loaded one, got none"):
        other.step(lambda: x.square().sum())


def test_schedulers_act_on_it() -> None:
    x = nn.Parameter(torch.ones(8))
    optimizer = MASHA1([x], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    for _ in range(3):
        optimizer.step(lambda: x.square().sum())
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.0125


# What is refused.


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (MASHA1, {"lr": -1.0}, r"MASHA1: expected 0 <= lr, got lr=-1\.0"),
        (MASHA2, {"tau": 1.0}, r"MASHA2: expected 0 <= tau < 1, got tau=1\.0"),
        (MASHA1, {"compressor": TopK(ratio=0.1)}, r"MASHA1: expected an unbiased compressor, got TopK\(.*MASHA2"),
        (MASHA1, {"compressor": RandomK(k=2, chunk=8, unbiased=False)}, "expected an unbiased compressor, got RandomK"),
        (MASHA1, {"compressor": Identity(), "second": Cast()}, "expected an unbiased compressor, got Cast"),
        (MASHA2, {"compressor": RANDOM}, r"expected a compressor that is a contraction, got RandomK\(.*wrap it in Sc"),
        (MASHA2, {"second": BlockQuantize(stochastic=True, bits=2)}, "expected a compressor that is a contraction"),
        (MASHA2, {"compressor": ScaledSign(width=8), "second": Identity(width=8), "exchange": TwoPhase()}, "got both"),
        (MASHA1, {"exchange": AllGather(merge="contributors")}, "expected the mean, the same on all ranks"),
        (MASHA1, {"prox": 3}, "expected a function .* got prox=3"),
        (MASHA1, {"participants": 5}, "participants"),
    ],
)
def test_refuses(cls: type[MASHA], arguments: dict[str, Any], message: str) -> None:
    x = nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match=message):
        cls([x], **{"lr": 0.1, **arguments}).step(lambda: x.square().sum())


def test_refuses_parameters() -> None:
    with pytest.raises(ValueError, match="MASHA1: expected at least one parameter that requires a gradient, got none"):
        MASHA1([torch.ones(3)], lr=0.1)
    with pytest.raises(ValueError, match=r"MASHA1: expected whole tensors of real numbers, got torch.complex64"):
        MASHA1([nn.Parameter(torch.ones(3, dtype=torch.complex64))], lr=0.1)
    with pytest.raises(ValueError, match="MASHA2: expected no prox"):
        MASHA2([{"params": [nn.Parameter(torch.ones(3))], "prox": lambda tensor, lr: None}], lr=0.1)


def test_refuses_closures() -> None:
    x = nn.Parameter(torch.ones(8))
    with pytest.raises(ValueError, match="MASHA1: expected a closure that evaluates the loss, got None"):
        MASHA1([x], lr=0.1).step()
    with pytest.raises(ValueError, match="expected no full_closure with full_batch=True"):
        MASHA1([x], lr=0.1, full_batch=True).step(lambda: x.sum(), full_closure=lambda: x.sum())
    for losses, got in ((lambda: x.sum(), r"shape \(\)"), (lambda: 1.0, "float")):
        with pytest.raises(ValueError, match=rf"the losses of 3 workers as a tensor of shape \(3,\).* got {got}"):
            MASHA1([x], lr=0.1, exchange=Simulated(3)).step(losses)
    table = nn.Embedding(4, 2, sparse=True)
    with pytest.raises(RuntimeError, match=r"expected dense gradients, got torch\.sparse_coo"):
        MASHA1(table.parameters(), lr=0.1).step(lambda: table(torch.tensor([1])).sum())


def test_the_command_does_not_offer_it() -> None:
    """It has two players and closures, which `gradwire train` has not."""
    assert not {"MASHA1", "MASHA2"} & set(specs.catalogue()["optimizer"])


# The experiment of `gradwire bench theory`.


def test_experiment_shows_what_it_claims() -> None:
    record = saddle.run(quick=True)
    lines = saddle.CLAIM.lines(record)
    assert [line.what for line in lines if not line.holds] == []
    methods, plain = record["methods"], record["plain"]
    dense = methods["extragradient, dense"]
    for name in ("MASHA1, RandomK", "MASHA1, DARE", "MASHA2, TopK"):
        assert methods[name]["last"] <= record["target"]
        assert methods[name]["bytes"] < 0.9 * dense["bytes"]
    for found in record["theory"].values():
        assert found["factor"] < found["proven"] - 0.005
    for found in plain.values():
        assert found["last"] > 300 * record["target"]
    saddle.CLAIM.draw(Figure(), record)


def test_experiment_s_problem() -> None:
    """Its operator is the gradient of its losses, and vanishes at its solution."""
    problem = saddle.Saddle(workers=3, d=8, mu=0.1)
    x, y = (part.float().requires_grad_() for part in problem.solution.split(8))
    means = torch.autograd.grad(problem.losses(x, y).mean(), [x, y])
    of_x, of_y = problem.operators(x.detach(), y.detach())
    torch.testing.assert_close(of_x.mean(dim=0), means[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(of_y.mean(dim=0), -means[1], rtol=0, atol=1e-5)
    assert max(mean.abs().max() for mean in means) < 1e-5
    assert of_x.abs().max() > 0.1
