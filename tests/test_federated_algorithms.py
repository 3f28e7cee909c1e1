"""Federated algorithms against their references, closed forms and one another."""

from typing import Any

import numpy as np
import pytest
import torch
from cases import ALGORITHMS, AlgorithmCase
from federating import (
    Problem,
    arriving,
    case_simulation,
    falling,
    quadratic,
    reference_run,
    simulation,
    train,
    unequal,
    weights,
)
from naming import plain

from gradwire.federated import (
    SCAFFOLD,
    FedAvg,
    FedDyn,
    FedNova,
    FedProx,
    LocalTraining,
    Simulation,
)

every_case = pytest.mark.parametrize("case", ALGORITHMS, ids=lambda case: f"{plain(case)}-{case.training}")


def assert_near(actual: Any, expected: Any, tolerance: float = 1e-12) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=tolerance)


def controls(made: Simulation) -> np.ndarray:
    """c_i of every client."""
    return np.array([made.store.get(client)["control"].numpy() for client in range(len(made.clients))])


@every_case
def test_equals_the_reference(case: AlgorithmCase) -> None:
    problem = Problem()
    made = case_simulation(case, problem)
    options = {}
    if case.compress is not None:
        compressor = case.algorithm.message_compressor
        options["compress"] = arriving(compressor, case.compress, made.seed, case.algorithm.messages[0])
    for expected in case.reference(reference_run(made, problem, rounds=15, **options)):
        made.step()
        assert_near(made.server.vector, expected)


@pytest.mark.parametrize(
    ("case", "kwargs", "message"), [(case, *error) for case in ALGORITHMS for error in case.errors], ids=plain
)
def test_refuses(case: AlgorithmCase, kwargs: dict[str, Any], message: str) -> None:
    fields = {name: getattr(case.algorithm, name) for name in case.algorithm.__dataclass_fields__}
    with pytest.raises(ValueError, match=message):
        type(case.algorithm)(**{**fields, **kwargs})


@every_case
def test_does_not_depend_on_the_order_of_clients(case: AlgorithmCase) -> None:
    problem = Problem()
    forwards, backwards = case_simulation(case, problem), case_simulation(case, problem)
    cohort = forwards.cohort
    backwards.cohort = lambda round: cohort(round)[::-1]  # type: ignore[method-assign]
    assert_near(train(forwards, 6), train(backwards, 6), 1e-13)
    for client in forwards.store.touched:
        for name, value in forwards.store.get(client).items():
            assert_near(value, backwards.store.get(client)[name], 1e-13)


def keeps_mean(case: AlgorithmCase) -> bool:
    return "control" in case.algorithm.client_state and not getattr(case.algorithm, "max_norm", None)


@pytest.mark.parametrize(
    "case", list(filter(keeps_mean, ALGORITHMS)), ids=lambda case: f"{plain(case)}-{case.training}"
)
def test_server_keeps_the_mean_of_what_clients_keep(case: AlgorithmCase) -> None:
    algorithm, problem = case.algorithm, Problem()
    made = case_simulation(case, problem, dropout=0.2)
    p = np.array(weights(algorithm, problem))
    for _ in range(8):
        made.step()
        mean = p @ controls(made) / p.sum()
        assert_near(mean, made.server.state["control"] if algorithm.server_state else 0.0, 1e-13)
    assert np.abs(controls(made)).max() > 0.1


@every_case
@pytest.mark.parametrize("how", ["raises", "inf", "nan"])
def test_a_client_that_fails_leaves_no_trace(case: AlgorithmCase, how: str) -> None:
    """As if it had not been drawn: nothing of it at the server, and its own vectors as they were."""
    problem, failing, calls = Problem(), 3, {"on": False}
    bad = torch.tensor(problem.a[failing])

    def loss(model: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        value = quadratic(model, a, b)
        if calls["on"] and a.shape == bad.shape and torch.equal(a, bad):
            if how == "raises":
                raise RuntimeError("out of memory")
            return value * float(how)
        return value

    everyone = {"cohort_size": None}
    made = case_simulation(case, problem, loss=loss, on_error="skip", **everyone)
    other = case_simulation(case, problem, **everyone)
    train(made, 2)
    train(other, 2)
    before = made.store.get(failing)
    calls["on"] = True
    record = made.step()
    assert (record.failures == {failing: "RuntimeError: out of memory"}) == (how == "raises")
    assert record.not_finite == (how != "raises")
    assert record.participants == len(problem.sizes) - 1
    other._drops_out = lambda round, client: client == failing  # type: ignore[method-assign]
    other.step()
    for name, value in made.store.get(failing).items():
        assert torch.equal(value, before[name])
    assert_near(made.server.vector, other.server.vector, 1e-14)
    calls["on"] = False
    assert made.step().participants == len(problem.sizes)
    assert np.isfinite(made.server.vector.numpy()).all()


def test_fedavg_of_one_full_step_is_gradient_descent() -> None:
    problem = Problem()
    made = simulation(problem, FedAvg(weighting="uniform"), lr=0.1, steps=1)
    x = made.server.vector.numpy().copy()
    for _ in range(10):
        made.step()
        x -= 0.1 * np.mean([problem.gradient(i, x) for i in range(len(problem.sizes))], axis=0)
        assert_near(made.server.vector, x, 1e-14)


STEPS = (1, 2, 4, 8, 16, 32, 2, 5)


def one_each() -> Problem:
    """One row for every client, its curvatures all alike, so that one factor makes a round a Newton step."""
    problem = Problem((1,) * 8, dimension=3)
    for a in problem.a:
        a[:] = a[0, 0]
    return problem


def fixed_point(problem: Problem, algorithm: Any, lr: float) -> tuple[np.ndarray, np.ndarray]:
    """Where rounds end, and sum_i p_i s_i b_i / sum_i p_i s_i, s_i = 1 - (1 - lr a_i)^K_i, over K_i for FedNova."""
    a, b, k = np.concatenate(problem.a), np.concatenate(problem.b), np.array(STEPS)[:, None]
    p = np.array(weights(algorithm, problem))[:, None]
    s = p * (1 - (1 - lr * a) ** k)
    progress = s.sum(0) / p.sum()
    if isinstance(algorithm, FedNova):
        s = s / k
        progress = s.sum(0) / p.sum() * (p * k).sum() / p.sum()
    made = simulation(
        problem, algorithm, lr=lr, steps=lambda round, client: STEPS[client], server_lr=1 / float(progress[0])
    )
    return train(made, 3), (s * b).sum(0) / s.sum(0)


@pytest.mark.parametrize("weighting", ["uniform", lambda client, count: 1.0 + client], ids=["uniform", "callable"])
@pytest.mark.parametrize("cls", [FedAvg, FedNova])
def test_fixed_points_in_closed_form(weighting: Any, cls: Any) -> None:
    assert_near(*fixed_point(one_each(), cls(weighting=weighting), lr=0.05), 1e-13)


def test_bias_of_fednova_falls_with_lr_and_that_of_fedavg_does_not() -> None:
    problem = one_each()
    optimum = problem.optimum([1.0] * 8)
    lrs = (0.05, 0.005, 0.0005)
    averaged, normalised = (
        [np.abs(fixed_point(problem, cls(weighting="uniform"), lr)[0] - optimum).max() for lr in lrs]
        for cls in (FedAvg, FedNova)
    )
    assert averaged[2] > averaged[1] * 0.9 > averaged[0] / 2
    assert normalised[1] < normalised[0] / 5
    assert normalised[2] == pytest.approx(normalised[1] / 10, rel=0.1)


def test_fedprox_with_exact_local_solutions() -> None:
    """sum_i p_i q_i b_i / sum_i p_i q_i with q_i = a_i / (a_i + mu), nearer to the minimum the larger mu."""
    problem = Problem((1,) * 8, dimension=1)
    a, b, bias = np.concatenate(problem.a), np.concatenate(problem.b), []
    for mu in (0.0, 0.1, 1.0, 10.0, 1000.0):
        q = a / (a + mu)
        made = simulation(
            problem,
            FedProx(mu, weighting="uniform"),
            lr=1 / (a.max() + mu),
            steps=110,  # the local solution, to 1e-13
            server_lr=1 / q.mean(),  # one round is enough then
        )
        x = train(made, 2)
        assert_near(x, (q * b).sum(0) / q.sum(0), 1e-11)
        bias.append(float(np.abs(x - problem.optimum([1.0] * 8))[0]))
    assert bias == sorted(bias, reverse=True)
    assert bias[-1] < bias[0] / 500


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fedprox_of_one_step_is_fedavg(momentum: float) -> None:
    problem = Problem()
    ends = [
        train(simulation(problem, algorithm, steps=1, training={"momentum": momentum}, cohort_size=3), 10)
        for algorithm in (FedAvg(), FedProx(mu=10.0))
    ]
    assert np.array_equal(*ends)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fednova_with_equal_steps_is_fedavg(momentum: float) -> None:
    problem = Problem()
    ends = [
        train(simulation(problem, algorithm, training={"momentum": momentum}, cohort_size=3), 10)
        for algorithm in (FedAvg(), FedNova())
    ]
    assert_near(*ends, 1e-14)


def test_fednova_counts_effective_steps() -> None:
    assert FedNova.effective_steps(10) == 10
    assert FedNova.effective_steps(10, momentum=0.9) == pytest.approx(41.381059609, abs=1e-9)
    assert FedNova.effective_steps(10, decay=0.01) == pytest.approx(9.5617925, abs=1e-7)
    count = total = 0.0
    for steps in range(8):  # the authors' counter
        assert FedNova.effective_steps(steps, momentum=0.7) == pytest.approx(total, abs=1e-12)
        count = 0.7 * count + 1
        total += count
    with pytest.raises(ValueError, match=r"expected momentum or a proximal term, got momentum=0\.9, lr mu=0\.1"):
        FedNova.effective_steps(3, momentum=0.9, decay=0.1)


def mild() -> Problem:
    """A few clients that differ, on which rounds converge quickly."""
    problem = Problem((1, 3, 2, 2), dimension=2)
    for a in problem.a:
        a[:] = 0.75 + a / 4
    return problem


@pytest.mark.parametrize(
    ("algorithm", "cohort_size", "steps"),
    [
        (SCAFFOLD(), None, 5),
        (SCAFFOLD(weighting="samples"), 2, unequal),
        (SCAFFOLD(form="one variable", weighting="samples"), 2, 5),
        (SCAFFOLD(form="zero overhead", weighting="samples"), None, 5),
        (SCAFFOLD(option="I"), 2, unequal),
        (FedDyn(alpha=0.5), None, 15),
        (FedDyn(alpha=0.5, weighting="samples"), 2, 10),
    ],
    ids=plain,
)
def test_drift_is_corrected_to_the_minimum_of_the_mean_loss(algorithm: Any, cohort_size: Any, steps: Any) -> None:
    problem = mild()
    made = simulation(problem, algorithm, steps=steps, cohort_size=cohort_size, lr=0.2)
    optimum = problem.optimum(weights(algorithm, problem))
    assert_near(train(made, 70 if cohort_size is None else 150), optimum, 1e-11)
    plain = simulation(problem, FedAvg(weighting=algorithm.weighting), steps=steps, lr=0.2)
    assert np.abs(train(plain, 15) - optimum).max() > 1e-2


@pytest.mark.parametrize("option", ["I", "II"])
def test_control_variates_point_uphill_of_their_clients(option: Any) -> None:
    problem = Problem()
    made = simulation(problem, SCAFFOLD(option=option))
    x = made.server.vector.numpy().copy()
    made.step()
    for client, control in enumerate(controls(made)):
        gradient = problem.gradient(client, x)
        assert control @ gradient > 0.5 * gradient @ gradient
        if option == "I":
            assert_near(control, gradient, 1e-14)


def test_option_one_takes_the_gradient_of_all_examples() -> None:
    problem = Problem()
    made = simulation(problem, SCAFFOLD(option="I"), training={"batch_size": 2, "shuffle": True})
    x = made.server.vector.numpy().copy()
    made.step()
    for client, control in enumerate(controls(made)):
        assert_near(control, problem.gradient(client, x), 1e-14)


def test_feddyn_keeps_its_memory_short() -> None:
    problem = Problem()
    made = simulation(problem, FedDyn(alpha=0.5, max_norm=0.1), cohort_size=3)
    free = simulation(problem, FedDyn(alpha=0.5), cohort_size=3)
    for _ in range(5):
        made.step()
        free.step()
        assert made.server.state["control"].norm() <= 0.1 + 1e-15
    assert free.server.state["control"].norm() > 0.2


@pytest.mark.parametrize(
    ("algorithm", "training", "options", "message"),
    [
        (SCAFFOLD(), {"momentum": 0.9}, {}, "SCAFFOLD: expected local training by plain SGD"),
        (SCAFFOLD(), {"weight_decay": 0.1}, {}, "SCAFFOLD: expected local training by plain SGD"),
        (SCAFFOLD(), {"optimizer": torch.optim.Adam}, {}, "SCAFFOLD: expected local training by plain SGD"),
        (SCAFFOLD(form="one variable"), {"steps": None}, {}, r"expected LocalTraining\(steps=number\)"),
        (SCAFFOLD(form="one variable"), {"steps": unequal}, {}, "need form='textbook'"),
        (SCAFFOLD(form="one variable"), {}, {"stragglers": "partial"}, "Use stragglers='drop'"),
        (SCAFFOLD(form="zero overhead"), {}, {"cohort_size": 3}, "got cohort_size=3 of 7"),
        (SCAFFOLD(form="zero overhead"), {}, {"server_lr": 0.5}, r"server_lr=0\.5"),
        (SCAFFOLD(form="zero overhead"), {}, {"server_optimizer": torch.optim.Adam}, "server_lr=None"),
        (FedNova(), {"optimizer": torch.optim.Adam}, {}, "FedNova: expected local training by SGD"),
        (FedNova(mu=0.1), {"momentum": 0.9}, {}, r"FedNova: expected momentum or a proximal term, got momentum=0\.9"),
    ],
)
def test_refuses_what_it_does_not_fit(
    algorithm: Any, training: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        simulation(Problem(), algorithm, training=training, **options)


@pytest.mark.parametrize(
    "algorithm", [SCAFFOLD(option="I"), SCAFFOLD(sum_gradients=True), FedDyn(alpha=0.5), FedNova()]
)
def test_takes_momentum_where_state_stays_a_gradient(algorithm: Any) -> None:
    problem = mild()
    made = simulation(problem, algorithm, training={"momentum": 0.5}, lr=0.1)
    optimum = problem.optimum(weights(algorithm, problem))
    assert np.abs(train(made, 60) - optimum).max() < (0.1 if isinstance(algorithm, FedNova) else 1e-9)


def test_clients_without_examples_take_no_part() -> None:
    problem = Problem((2, 0, 3, 1), dimension=3)
    for algorithm in (SCAFFOLD(), FedNova(weighting="uniform"), FedAvg(weighting="uniform"), FedDyn(alpha=1.0)):
        made = simulation(problem, algorithm)
        record = made.step()
        assert (record.participants, record.lost) == (3, 1)
        assert 1 not in made.store.touched
    made = simulation(problem, SCAFFOLD(), lr=0.2)
    others = Problem((2, 3, 1), dimension=3)
    others.a[:], others.b[:] = [problem.a[i] for i in (0, 2, 3)], [problem.b[i] for i in (0, 2, 3)]
    assert_near(train(made, 60), others.optimum([1.0] * 3), 1e-9)


@every_case
def test_bytes_are_those_of_the_vectors(case: AlgorithmCase) -> None:
    problem = Problem()
    made = case_simulation(case, problem)
    record = made.step()
    algorithm, vector = case.algorithm, 8 * problem.dimension
    compressor = algorithm.message_compressor
    each = compressor.payload_bytes((problem.dimension,), torch.float64) if compressor else vector
    each *= len(algorithm.messages)
    assert record.bytes_up == record.participants * (each + 8 * len(algorithm.scalars))
    assert record.bytes_down == record.participants * vector * (1 + len(algorithm.broadcast))


def test_lr_of_a_round_reaches_clients_and_server() -> None:
    assert LocalTraining(lr=falling).lr_at(2) == pytest.approx(0.1 * 0.95**2)
