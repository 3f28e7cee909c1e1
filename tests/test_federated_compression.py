"""SCALLION and SCAFCOM on the library's compressors, and lossy uplinks of other algorithms."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from federating import (
    Problem,
    arriving,
    falling,
    quadratic,
    reference_run,
    simulation,
    train,
    weights,
)
from reference import federated as reference
from reference import quantizers, sparsifiers

from gradwire import comm
from gradwire import compression as C
from gradwire.federated import SCAFCOM, SCAFFOLD, SCALLION, ClientStore, FedAvg, FedDyn, Link, Server, resync


def assert_near(actual: Any, expected: Any, tolerance: float) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


def mild(dimension: int = 20) -> Problem:
    """Clients that differ in their minima, and little in their curvatures."""
    problem = Problem((1,) * 8, dimension)
    for a in problem.a:
        a[:] = 0.75 + a / 4
    return problem


@pytest.mark.parametrize("weighting", ["uniform", "samples"])
@pytest.mark.parametrize("form", ["textbook", "one variable"])
def test_scallion_without_loss_is_scaffold(form: Any, weighting: Any) -> None:
    problem = Problem()
    made = [
        simulation(problem, algorithm, lr=falling, cohort_size=3, server_lr=0.8)
        for algorithm in (
            SCAFFOLD(form=form, weighting=weighting),
            SCALLION(C.Identity(), alpha=1.0, weighting=weighting),
        )
    ]
    for _ in range(12):
        for one in made:
            one.step()
        assert_near(made[0].server.vector, made[1].server.vector, 1e-13)
        assert_near(made[0].server.state["control"], made[1].server.state["control"], 1e-13)


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_scafcom_without_loss_is_scallion(beta: float) -> None:
    problem = Problem()
    made = [
        simulation(problem, algorithm, lr=falling, cohort_size=3)
        for algorithm in (SCAFCOM(C.Identity(), beta=beta), SCALLION(C.Identity(), alpha=beta))
    ]
    for _ in range(12):
        for one in made:
            one.step()
        assert_near(made[0].server.vector, made[1].server.vector, 1e-13)


def test_alpha_follows_from_omega() -> None:
    assert SCALLION(C.RandomK(k=1, chunk=4)).alpha_for(100) == 0.1
    assert SCALLION(C.RandomK(k=1, chunk=40)).alpha_for(100) == 1 / 40
    assert SCALLION(C.RandomK(k=1, chunk=40), alpha=0.5).alpha_for(100) == 0.5
    qsgd = C.QSGD(levels=1, bucket=2410)
    omega = qsgd.omega(2410)
    assert omega is not None
    assert SCALLION(qsgd).alpha_for(2410) == 1 / (1 + omega) < 0.025


@pytest.mark.parametrize("damped", [True, False], ids=["damped", "divided"])
def test_scallion_converges_up_to_alpha_and_diverges_far_beyond(damped: bool) -> None:
    problem, compressor = mild(), C.RandomK(k=2, chunk=20)  # omega is 9
    optimum = problem.optimum([1.0] * 8)
    options: dict[str, Any] = {"lr": 0.02, "steps": 3, "cohort_size": 4}
    stable = simulation(problem, SCALLION(compressor, damped=damped), **options)
    before = np.abs(stable.server.vector.numpy() - optimum).max()
    assert np.abs(train(stable, 300) - optimum).max() < 1e-2 * before
    with pytest.warns(UserWarning, match=r"SCALLION: expected alpha <= 1 / \(1 \+ omega\) = 0\.1 .* got alpha=0\.5"):
        unstable = simulation(problem, SCALLION(compressor, alpha=0.5, damped=damped), **options)
    assert np.abs(train(unstable, 100) - optimum).max() > 1e3 * before


@pytest.mark.parametrize("beta", [0.2, 1.0])
@pytest.mark.parametrize(
    "compressor",
    [C.TopK(ratio=0.1), C.ScaledSign(width=20), C.QSGD(levels=1, bucket=20)],
    ids=lambda compressor: type(compressor).__name__,
)
def test_scafcom_converges_with_any_compressor(compressor: Any, beta: float) -> None:
    problem = mild()
    optimum = problem.optimum([1.0] * 8)
    options: dict[str, Any] = {"lr": 0.1, "steps": 2, "cohort_size": 4}
    made = simulation(problem, SCAFCOM(compressor, beta=beta), **options)
    before = np.abs(made.server.vector.numpy() - optimum).max()
    assert np.abs(train(made, 300) - optimum).max() < 0.02 * before
    plain = simulation(problem, FedAvg(), uplink=Link(made.algorithm.message_compressor), **options)
    assert np.abs(train(plain, 60) - optimum).max() > 0.05 * before


def test_scafcom_is_ef21_sgdm_of_mean_gradients() -> None:
    """With all clients and one step, c is the estimate of a communicator with that feedback."""
    problem, compressor = mild(8), C.TopK(ratio=0.25)
    made = simulation(problem, SCAFCOM(compressor, beta=0.3), lr=0.1, steps=1)
    simulated = comm.Communicator(
        compressor,
        feedback=comm.EF21SGDM(eta=0.3),
        exchange=comm.Simulated(8),
        plan=comm.Plan(min_ndim=0, min_numel=0),
    )
    x = made.server.vector.numpy().copy()
    for _ in range(10):
        gradients = torch.tensor(np.array([problem.gradient(i, x) for i in range(8)]))
        simulated.average_([gradients], ["x"])
        x = x - 0.1 * gradients[0].numpy()
        made.step()
        assert_near(made.server.vector, x, 1e-12)
        assert_near(made.server.state["control"], gradients[0], 1e-12)


@pytest.mark.parametrize(
    "algorithm",
    [SCAFCOM(C.ScaledSign(width=12)), SCAFCOM(C.TopK(ratio=0.1)), SCALLION(C.RandomK(k=1, chunk=12))],
    ids=str,
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("entry", [0, 7])
def test_what_is_not_finite_cannot_hide_in_compression(algorithm: Any, value: float, entry: int) -> None:
    problem, on = Problem(), {"on": False}

    def loss(model: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        bad = on["on"] and torch.equal(a, torch.tensor(problem.a[3]))
        return quadratic(model, a, b) + model.x[entry] * (value if bad else 1.0)

    made = simulation(problem, algorithm, loss=loss)
    train(made, 2)
    before = made.store.get(3)
    on["on"] = True
    record = made.step()
    assert (record.not_finite, record.participants) == (1, 6)
    for name, vector in made.store.get(3).items():
        assert torch.equal(vector, before[name])


@pytest.mark.parametrize("cohort_size", [None, 3])
@pytest.mark.parametrize("feedback", [comm.EF(), comm.EF21()], ids=lambda feedback: type(feedback).__name__)
def test_uplink_of_fedavg(feedback: Any, cohort_size: int | None) -> None:
    problem, compressor = Problem(), C.TopK(ratio=0.25)
    made = simulation(
        problem,
        FedAvg(weighting="uniform"),
        lr=falling,
        cohort_size=cohort_size,
        server_lr=0.6,
        uplink=Link(compressor, feedback),
    )
    compress = arriving(compressor, lambda rows: sparsifiers.top_k(rows, ratio=0.25), made.seed, "pseudo_gradient")
    run = reference_run(made, problem, 12, compress=compress)
    for expected in reference.feedback_fedavg(run, track=isinstance(feedback, comm.EF21)):
        made.step()
        assert_near(made.server.vector, expected, 1e-12)


def test_uplink_without_feedback() -> None:
    """Clients draw for themselves; of QSGD, whose scales are float32."""
    problem, compressor = Problem(), C.QSGD(levels=2, bucket=6)
    made = simulation(problem, FedAvg(), lr=falling, cohort_size=3, uplink=Link(compressor), seed=11)
    compress = partial(quantizers.linear_dithering, levels=2, norm=2)
    arrive = arriving(compressor, compress, made.seed, "pseudo_gradient")
    x = made.server.vector.numpy().copy()
    run = reference_run(made, problem, 8)
    for r, cohort in enumerate(run.cohorts):
        movements = [x - run.train(r, i, x)[0] for i in cohort]
        arrived = [arrive(r, i, movement) for i, movement in zip(cohort, movements, strict=True)]
        assert min(np.abs(one - other).max() for one, other in zip(arrived, movements, strict=True)) > 1e-3
        x = x - run.shares(cohort) @ np.array(arrived)
        made.step()
        assert_near(made.server.vector, x, 1e-5)


def test_scallion_draws_anew_for_every_client_and_round() -> None:
    problem, compressor = Problem((1,) * 3), C.QSGD(levels=1, bucket=12)
    problem.a[1:], problem.b[1:] = [problem.a[0]] * 2, [problem.b[0]] * 2
    made = simulation(problem, SCALLION(compressor))
    kept = []
    for _ in range(2):
        made.step()
        kept += [made.store.get(client)["control"].clone() for client in range(3)]
    assert len({tuple(vector.tolist()) for vector in kept}) == 6


@pytest.mark.parametrize(
    "algorithm", [SCAFFOLD(), SCAFFOLD(form="one variable"), FedDyn(alpha=0.5, weighting="samples")], ids=str
)
def test_server_keeps_the_mean_behind_a_lossy_uplink(algorithm: Any) -> None:
    problem = Problem()
    made = simulation(problem, algorithm, cohort_size=3, uplink=Link(C.TopK(ratio=0.25), comm.EF()), dropout=0.2)
    p = np.array(weights(algorithm, problem))
    for _ in range(8):
        made.step()
        own = np.array([made.store.get(client)["control"].numpy() for client in range(len(p))])
        assert_near(made.server.state["control"], p @ own / p.sum(), 1e-13)
    assert np.abs(own).max() > 0.1


def test_zero_overhead_adds_up_to_zero_behind_a_lossy_uplink() -> None:
    problem = Problem()
    made = simulation(problem, SCAFFOLD(form="zero overhead"), uplink=Link(C.TopK(ratio=0.25), comm.EF()), dropout=0.2)
    train(made, 8)
    own = np.array([made.store.get(client)["control"].numpy() for client in range(len(problem.sizes))])
    assert_near(own.sum(axis=0), 0.0, 1e-12)


@pytest.mark.parametrize(
    ("algorithm", "uplink", "message"),
    [
        (SCAFFOLD(), Link(C.TopK(ratio=0.5), comm.EF21()), "since SCAFFOLD keeps what arrives"),
        (SCAFCOM(C.TopK(ratio=0.5)), Link(C.TopK(ratio=0.5)), "expected no uplink beside SCAFCOM"),
        (FedAvg(), Link(C.TopK(ratio=0.5), comm.EF21SGDM()), "EF21SGDM: expected all clients in every round"),
    ],
)
def test_refuses_uplinks(algorithm: Any, uplink: Link, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulation(Problem(), algorithm, uplink=uplink, cohort_size=3)


@pytest.mark.parametrize("cls", [SCALLION, SCAFCOM])
def test_refuses_what_is_no_compressor(cls: Any) -> None:
    with pytest.raises(TypeError, match="expected a Compressor, got 'top-k'"):
        cls("top-k")


def test_resync() -> None:
    problem = Problem()
    algorithm = SCAFCOM(C.TopK(ratio=0.25), weighting="samples")
    made = simulation(problem, algorithm, cohort_size=5)
    train(made, 5)

    def weight(client: int) -> float:
        return algorithm.weight(client, problem.sizes[client])

    assert resync(made.server, made.store, weight) < 1e-14
    lost = made.store.touched[0]
    gone = made.store.get(lost)["control"].clone()
    made.store.forget([lost])
    before = made.server.state["control"].clone()
    share = problem.sizes[lost] / sum(problem.sizes)
    assert resync(made.server, made.store, weight).item() == pytest.approx(share * gone.norm().item())
    assert_near(made.server.state["control"], before - share * gone, 1e-14)


def test_resync_counts_clients_that_never_took_part() -> None:
    server = Server(SCAFFOLD(), torch.zeros(2), {"w": torch.Size([2])})
    store = ClientStore({"control": 2}, clients=4)
    store.put(1, {"control": torch.tensor([4.0, 8.0])})
    resync(server, store)
    assert server.state["control"].tolist() == [1.0, 2.0]


def test_resync_over_processes() -> None:
    problem = Problem()
    made = simulation(problem, SCAFFOLD())
    train(made, 2)
    stores = [ClientStore({"control": problem.dimension}, len(problem.sizes), torch.float64) for _ in range(2)]
    totals = torch.zeros(problem.dimension, dtype=torch.float64)
    for client in made.store.touched:
        own = made.store.get(client)
        stores[client % 2].put(client, own)
        totals += own["control"]

    class Sums:
        def sum_(self, tensors: list[torch.Tensor]) -> None:
            tensors[0].copy_(totals)

    expected = made.server.state["control"].clone()
    for store in stores:
        made.server.state["control"].zero_()
        resync(made.server, store, engine=Sums())  # type: ignore[arg-type]
        assert_near(made.server.state["control"], expected, 1e-13)
