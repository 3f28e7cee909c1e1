"""Markov chains and self-repellent walks against closed forms, and the claim on token SGD at small size."""

import copy
import itertools
import math
import warnings

import networkx
import numpy as np
import pytest
import torch

from gradwire.bench.theory import walk as claim
from gradwire.comm import CheckpointError
from gradwire.comm.random_walk import (
    MarkovChain,
    SelfRepellentWalk,
    WalkEnsemble,
    iterate_covariance,
    mean_squared_error,
    measure_covariance,
)

KARATE = networkx.karate_club_graph()
TARGET = np.random.default_rng(0).uniform(0.5, 2.0, size=34)
CHAINS = {
    "uniform": MarkovChain.metropolis_hastings(KARATE),
    "target": MarkovChain.metropolis_hastings(KARATE, 7 * TARGET),
    "max degree": MarkovChain.max_degree(KARATE),
    "simple": MarkovChain.simple(KARATE),
    "lazy": MarkovChain.metropolis_hastings(KARATE, TARGET).lazy(0.3),
    "one node": MarkovChain.metropolis_hastings([[0]]),
}
every_chain = pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)


# Base chains.


@every_chain
def test_chain_is_stochastic_and_reversible(chain: MarkovChain) -> None:
    matrix, flow = chain.matrix(), chain.target[:, None] * chain.matrix()
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-14)
    np.testing.assert_allclose(flow, flow.T, atol=1e-16)
    assert (matrix >= 0).all()
    assert chain.target.sum() == pytest.approx(1)
    if chain.nodes > 1:
        assert ((matrix > 0) & ~np.eye(chain.nodes, dtype=bool) == networkx.to_numpy_array(KARATE).astype(bool)).all()


def test_chains_are_those_of_the_literature() -> None:
    degree = np.array([degree for _, degree in sorted(KARATE.degree)], dtype=float)
    edges = networkx.to_numpy_array(KARATE) != 0
    uniform = np.where(edges, np.minimum.outer(1 / degree, 1 / degree), 0)
    expected = {
        "uniform": uniform + np.diag(1 - uniform.sum(axis=1)),
        "simple": edges / degree[:, None],
        "max degree": edges / degree.max() + np.diag(1 - degree / degree.max()),
    }
    for name, matrix in expected.items():
        np.testing.assert_allclose(CHAINS[name].matrix(), matrix, atol=1e-14)
    np.testing.assert_allclose(CHAINS["simple"].target, degree / degree.sum(), atol=1e-15)
    np.testing.assert_allclose(CHAINS["target"].target, TARGET / TARGET.sum(), atol=1e-15)
    lazy = MarkovChain.metropolis_hastings(KARATE, TARGET).matrix()
    np.testing.assert_allclose(CHAINS["lazy"].matrix(), 0.3 * np.eye(34) + 0.7 * lazy, atol=1e-14)


@pytest.mark.parametrize("target", [np.ones(3), np.zeros(34), np.full(34, np.nan), -TARGET])
def test_bad_targets_are_refused(target: np.ndarray) -> None:
    with pytest.raises(ValueError, match="MarkovChain: expected a target of 34 finite entries > 0, got"):
        MarkovChain.metropolis_hastings(KARATE, target)


def test_bad_arguments_are_refused() -> None:
    for stay in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="expected 0 <= stay < 1, got stay="):
            CHAINS["uniform"].lazy(stay)
    for alpha in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="SelfRepellentWalk: expected a finite alpha >= 0, got alpha="):
            SelfRepellentWalk(KARATE, alpha)
        with pytest.raises(ValueError, match="WalkEnsemble: expected a finite alpha >= 0, got alpha="):
            WalkEnsemble(KARATE, [5.0, alpha], seeds=range(2))
    for exponent in (0.5, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"expected 0\.5 < exponent <= 1, got exponent="):
            SelfRepellentWalk(KARATE, exponent=exponent)
    for start in (34, -1, 0.5):
        with pytest.raises(ValueError, match="expected 0 <= start < 34, got start="):
            SelfRepellentWalk(KARATE, start=start)
    with pytest.raises(ValueError, match="MarkovChain: expected a connected graph, got no path from node 0 to node 1"):
        SelfRepellentWalk(networkx.empty_graph(2))


# The walk.


def _kernel(chain: MarkovChain, x: np.ndarray, alpha: float) -> np.ndarray:
    """K[x] as the paper has it."""
    weights = chain.matrix() * (x / chain.target) ** -alpha
    return weights / weights.sum(axis=1, keepdims=True)


@every_chain
def test_walk_is_that_of_the_paper(chain: MarkovChain) -> None:
    alpha, exponent = 3.0, 0.7
    walk = SelfRepellentWalk(chain, alpha, exponent, seed=5, start=chain.nodes - 1)
    x, visits = chain.target.copy(), np.zeros(chain.nodes)
    for step in range(1, 301):
        found = np.stack([walk.probabilities(node) for node in range(chain.nodes)])
        np.testing.assert_allclose(found, _kernel(chain, x, alpha), rtol=1e-9, atol=0)
        before = walk.node
        node = walk.step()
        assert chain.matrix()[before, node] > 0
        x += (step + 1) ** -exponent * ((np.arange(chain.nodes) == node) - x)
        visits[node] += 1
    np.testing.assert_allclose(walk.measure, x, rtol=1e-9)
    assert (walk.visits == visits).all()
    assert walk.steps == 300


@every_chain
def test_without_repellence_the_walk_is_the_chain(chain: MarkovChain) -> None:
    walk = SelfRepellentWalk(chain, alpha=0.0)
    for _ in range(50):
        walk.step()
    found = np.stack([walk.probabilities(node) for node in range(chain.nodes)])
    np.testing.assert_allclose(found, chain.matrix(), rtol=1e-12, atol=1e-15)


def test_steps_are_drawn_with_their_probabilities() -> None:
    expected = SelfRepellentWalk(KARATE, start=33).probabilities()
    counts = np.bincount(WalkEnsemble(KARATE, seeds=range(4000), start=33).step(), minlength=34)
    assert (counts[expected == 0] == 0).all()
    chi_square = ((counts - 4000 * expected) ** 2)[expected > 0] / (4000 * expected[expected > 0])
    assert chi_square.sum() < 45  # 17 degrees of freedom: exceeded once in 4000 times


def test_a_strong_repellence_survives_numbers_beyond_floats() -> None:
    walk = SelfRepellentWalk(KARATE, alpha=300.0, exponent=0.51, seed=1)
    for _ in range(30_000):  # s is about e^-310 here, and ratios of x to the power 300 are beyond 1e308
        walk.step()
    assert walk._log_scale < -250
    assert np.isfinite(walk.probabilities()).all()
    assert walk.measure.sum() == pytest.approx(1)
    assert walk.visits.min() > 0.9 * 30_000 / 34  # every node nearly as often as its share


def test_ensemble_makes_the_very_steps_of_single_walks() -> None:
    for chain in (CHAINS["target"], CHAINS["simple"]):
        alphas, seeds = [5.0, 0.0, 20.0, 5.0], [3, 3, 4, 5]
        ensemble = WalkEnsemble(chain, alphas, 0.7, seeds, start=2)
        singles = [SelfRepellentWalk(chain, alpha, 0.7, seed, 2) for alpha, seed in zip(alphas, seeds, strict=True)]
        for _ in range(1500):
            assert ensemble.step().tolist() == [walk.step() for walk in singles]
        np.testing.assert_allclose(ensemble.measure, [walk.measure for walk in singles], rtol=1e-12)


def test_resume_is_exact_and_copies_are_independent() -> None:
    walk = SelfRepellentWalk(KARATE, seed=2)
    for _ in range(700):
        walk.step()
    state, twin = copy.deepcopy(walk.state_dict()), copy.deepcopy(walk)
    expected = [walk.step() for _ in range(700)]
    again = SelfRepellentWalk(KARATE, seed=2, start=5)
    again.load_state_dict(state)
    assert [again.step() for _ in range(700)] == expected
    assert [twin.step() for _ in range(700)] == expected
    assert np.array_equal(again.measure, walk.measure)
    assert np.array_equal(again.visits, walk.visits)
    assert state["steps"] == 700
    assert torch.equal(state["visits"], SelfRepellentWalk(KARATE).state_dict()["visits"] + state["visits"])


@pytest.mark.parametrize("other", [{"alpha": 4.0}, {"seed": 1}, {"exponent": 0.9}, {"chain": CHAINS["simple"]}])
def test_the_state_of_another_walk_is_refused(other: dict) -> None:
    state = SelfRepellentWalk(**({"chain": KARATE} | other)).state_dict()
    with pytest.raises(
        CheckpointError, match=r"expected SelfRepellentWalk\(.*alpha=5\.0.* as configured now, got Self"
    ):
        SelfRepellentWalk(KARATE).load_state_dict(state)


# What theory predicts.


def _lyapunov(pull: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """V with pull V + V pull' = noise, by one linear system."""
    size = len(pull)
    system = np.kron(pull, np.eye(size)) + np.kron(np.eye(size), pull)
    return np.linalg.solve(system, noise.flatten()).reshape(size, size)


def _fundamental_noise(chain: MarkovChain) -> np.ndarray:
    """The base chain's long-run covariance of visits, D Z + Z' D - D - mu mu' by the fundamental matrix Z."""
    one = np.ones((chain.nodes, 1)) * chain.target
    fundamental = np.linalg.inv(np.eye(chain.nodes) - chain.matrix() + one)
    flow = np.diag(chain.target) @ fundamental
    return flow + flow.T - np.diag(chain.target) - np.outer(chain.target, chain.target)


@pytest.mark.parametrize("name", ["uniform", "target", "simple", "lazy"])
@pytest.mark.parametrize("exponent", [0.8, 1.0])
def test_measure_covariance_solves_its_lyapunov_equation(name: str, exponent: float) -> None:
    chain, alpha = CHAINS[name], 3.0
    # The drift of x: -(I + alpha (I + P')) x, less 1/2 where gamma is 1/n.
    pull = np.eye(34) + alpha * (np.eye(34) + chain.matrix().T) - 0.5 * (exponent == 1) * np.eye(34)
    expected = _lyapunov(pull, _fundamental_noise(chain))
    np.testing.assert_allclose(measure_covariance(chain, alpha, exponent), expected, atol=1e-12)


@pytest.mark.parametrize("name", ["uniform", "target"])
@pytest.mark.parametrize(("exponent", "step_exponent"), [(0.8, 0.9), (0.8, 1.0), (0.9, 0.9), (1.0, 1.0), (0.9, 0.7)])
def test_iterate_covariance_solves_its_lyapunov_equation(name: str, exponent: float, step_exponent: float) -> None:
    chain, alpha, numbers = CHAINS[name], 3.0, np.random.default_rng(1)
    gradients = numbers.standard_normal((34, 3))
    gradients -= chain.target @ gradients
    hessian = np.diag([1.0, 1.5, 2.0]) + 0.3
    drift, noise = alpha * (np.eye(34) + chain.matrix().T), _fundamental_noise(chain)
    shift = 0.5 * (step_exponent == 1)
    if exponent < step_exponent:  # x has settled: noise reaches theta through (I + drift)^-1
        through = gradients.T @ np.linalg.inv(np.eye(34) + drift)
        expected = _lyapunov(hessian - shift * np.eye(3), through @ noise @ through.T)
    elif exponent > step_exponent:  # x stands still
        expected = _lyapunov(hessian, gradients.T @ noise @ gradients)
    else:
        entering = np.vstack([np.eye(34), -gradients.T])
        pull = np.block([[np.eye(34) + drift, np.zeros((34, 3))], [-gradients.T @ drift, hessian]])
        expected = _lyapunov(pull - shift * np.eye(37), entering @ noise @ entering.T)[34:, 34:]
    found = iterate_covariance(chain, gradients, hessian, alpha, exponent, step_exponent)
    np.testing.assert_allclose(found, expected, atol=1e-10)


def test_mean_squared_error_is_the_recursion_of_the_whole_covariance() -> None:
    chain, exponent, step_exponent, steps = CHAINS["target"], 0.8, 0.9, 60
    gradients = np.random.default_rng(1).standard_normal((34, 3))
    hessian = np.diag([1.0, 1.5, 2.0]) + 0.3
    noise, alphas = _fundamental_noise(chain), [0.0, 0.2]
    found = mean_squared_error(chain, gradients, hessian, alphas, exponent, step_exponent, steps)
    for alpha, errors in zip(alphas, found, strict=True):
        drift, covariance = alpha * (np.eye(34) + chain.matrix().T), np.zeros((37, 37))
        for step in range(1, steps + 1):
            gamma, beta = (step + 1) ** -exponent, (step + 1) ** -step_exponent
            move = np.block(
                [
                    [np.eye(34) - gamma * (np.eye(34) + drift), np.zeros((34, 3))],
                    [beta * gradients.T @ drift, np.eye(3) - beta * hessian],
                ]
            )
            enter = np.vstack([gamma * np.eye(34), -beta * gradients.T])
            covariance = move @ covariance @ move.T + enter @ noise @ enter.T
        assert errors[-1] == pytest.approx(np.trace(covariance[34:, 34:]), rel=1e-9)
    one = mean_squared_error(chain, gradients, hessian, alphas[1], exponent, step_exponent, steps)
    np.testing.assert_array_equal(one, found[1])


def test_mean_squared_error_tends_to_its_limit() -> None:
    chain, gradients = CHAINS["uniform"], np.random.default_rng(2).standard_normal((34, 2))
    setting = (chain, gradients - gradients.mean(axis=0), np.eye(2), 0.5, 0.8, 0.8)
    errors = mean_squared_error(*setting, steps=20_000) * np.arange(2, 20_002) ** 0.8
    away = errors / np.trace(iterate_covariance(*setting)) - 1
    assert 0 < away[-1] < 0.04
    assert away[-1] < 0.8 * away[4999] < 0.64 * away[1249]  # the next term falls as n^-0.2, 0.76 in four times n


def test_more_repellence_helps_as_theory_says() -> None:
    chain, data = claim.problem()
    setting = (chain, -data, np.eye(data.shape[1]))

    def limit(alpha: float, step_exponent: float) -> float:
        return float(np.trace(iterate_covariance(*setting, alpha, 0.8, step_exponent)))

    for alpha, (exponent, factor) in itertools.product((1e3, 1e4), ((0.9, 4.0), (0.8, 2.0), (0.6, 1.0))):
        assert limit(alpha, exponent) / limit(2 * alpha, exponent) == pytest.approx(factor, rel=2e-2)


def test_exponents_that_let_bias_through_are_warned_of() -> None:
    setting = (CHAINS["uniform"], np.zeros((34, 1)), np.eye(1))
    with pytest.warns(UserWarning, match=r"expected 2 exponent - step_exponent >= 0\.3, got 0\.10"):
        mean_squared_error(*setting, 5.0, 0.55, 1.0, steps=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mean_squared_error(*setting, 0.0, 0.55, 1.0, steps=1)
        mean_squared_error(*setting, 5.0, 0.8, 1.0, steps=1)


def test_bad_problems_are_refused() -> None:
    chain = CHAINS["uniform"]
    with pytest.raises(ValueError, match=r"expected gradients of shape \(34, d\) and a hessian of \(d, d\), got"):
        iterate_covariance(chain, np.zeros((33, 2)), np.eye(2), 1.0, 0.8, 0.9)
    with pytest.raises(ValueError, match=r"expected a hessian with eigenvalues > 0\.5, got 0\.4"):
        iterate_covariance(chain, np.zeros((34, 1)), [[0.4]], 1.0, 0.8, 1.0)


def test_measure_varies_as_its_closed_form_says() -> None:
    runs, steps, exponent, alphas = 60, 4000, 0.9, (1.0, 5.0, 20.0)
    chain = CHAINS["uniform"]
    walks = WalkEnsemble(chain, np.repeat(alphas, runs), exponent, seeds=[*range(runs)] * len(alphas))
    found = np.zeros(len(alphas))
    for step in range(1, steps + 1):
        walks.step()
        if step >= steps // 2 and step % 20 == 0:
            squares = ((walks.measure - chain.target) ** 2).sum(axis=1) * (step + 1) ** exponent
            found += squares.reshape(len(alphas), runs).mean(axis=1) / 101
    expected = [np.trace(measure_covariance(chain, alpha, exponent)) for alpha in alphas]
    np.testing.assert_allclose(found, expected, rtol=0.1)


def test_claim_holds_at_small_size() -> None:
    record = claim.CLAIM.run(True)
    lines = claim.CLAIM.lines(record)
    assert len(lines) == 5
    assert [line for line in lines if not line.holds] == []
    record["sgd"]["0.9"]["measured"][1] *= 2  # and would not, were the variance twice what it should be
    assert not claim.CLAIM.lines(record)[0].holds
