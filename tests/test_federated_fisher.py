"""Fisher-weighted averaging, and masks in its place: means by entry inside of simulations."""

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from aggregating import assert_near
from federating import Problem, simulation, train
from torch import Tensor, nn

from gradwire.federated import (
    Algorithm,
    Clients,
    FedAvg,
    FisherAveraging,
    LocalTraining,
    LocalWork,
    Round,
    Simulation,
    WeightedMean,
    empirical_fisher,
    exact_fisher,
    merge,
)


def network() -> nn.Module:
    layers = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.5), nn.Linear(5, 3)).double()
    layers[0].bias.requires_grad_(False)
    layers(torch.randn(20, 4, dtype=torch.float64))
    return layers


def per_example(module: nn.Module, value: Tensor) -> Tensor:
    parts = torch.autograd.grad(value, [p for p in module.parameters() if p.requires_grad], retain_graph=True)
    return torch.cat([part.reshape(-1) for part in parts])


def cross_entropy(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(module(x), y)


@pytest.mark.parametrize("block", [1 << 22, 100], ids=["whole", "blocks"])
def test_diagonals_are_those_of_a_loop(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradwire.federated.fisher._BLOCK_ENTRIES", block)
    module, x, y = network(), torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3
    before = copy.deepcopy(module.state_dict())
    module[3].eval()  # modes are put back one by one
    empirical = empirical_fisher(module, cross_entropy, (x, y))
    categorical = exact_fisher(module, lambda module, x: module(x), (x,))
    gaussian = exact_fisher(module, lambda module, x: module(x), (x,), distribution="gaussian")
    assert (module.training, module[1].training, module[3].training) == (True, True, False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    module.eval()
    expected = [torch.zeros_like(empirical) for _ in range(3)]
    for i in range(7):
        outputs = module(x[i : i + 1])[0]
        logs = outputs.log_softmax(0)
        expected[0] += per_example(module, -logs[y[i]]) ** 2 / 7
        for c in range(3):
            expected[1] += logs[c].exp().detach() * per_example(module, logs[c]) ** 2 / 7
            expected[2] += per_example(module, outputs[c]) ** 2 / 7
    for found, value in zip((empirical, categorical, gaussian), expected, strict=True):
        assert_near(found, value, 1e-14)


def test_the_exact_diagonal_is_the_mean_over_labels_that_the_model_draws() -> None:
    module, x = network().eval(), torch.randn(3, 4, dtype=torch.float64)
    with torch.no_grad():
        labels = torch.distributions.Categorical(logits=module(x)).sample((4000,))
    drawn = empirical_fisher(module, cross_entropy, (x.repeat(4000, 1), labels.flatten()))
    exact = exact_fisher(module, lambda module, x: module(x), (x,))
    assert float((drawn - exact).norm() / exact.norm()) < 0.05


def test_exact_diagonal_of_a_sequence_is_summed_over_places() -> None:
    table = nn.Embedding(4, 3).double()
    tokens = torch.tensor([[0, 1, 1], [2, 0, 3]])
    found = exact_fisher(table, lambda module, x: module(x), (tokens,)).view(4, 3)
    p = table.weight.softmax(-1)
    counts = torch.tensor([2, 2, 1, 1]) / 2
    assert_near(found, (counts[:, None] * p * (1 - p)).detach(), 1e-14)


def test_distribution_is_one_of_two() -> None:
    with pytest.raises(ValueError, match="expected distribution categorical or gaussian, got 'poisson'"):
        exact_fisher(nn.Linear(1, 1), lambda module, x: module(x), (torch.ones(1, 1),), distribution="poisson")  # type: ignore[arg-type]


# Linear regression with one feature per example: the diagonal is all there is.


def regression(seed: int = 0, d: int = 6) -> tuple[list[Tensor], list[Tensor]]:
    rng, xs, ys = np.random.default_rng(seed), [], []
    for n in (8, 12, 20):
        x = np.zeros((n, d))
        x[np.arange(n), np.arange(n) % d] = rng.uniform(1.0, 2.0, n)
        xs.append(torch.tensor(x))
        ys.append(torch.tensor(x @ np.linspace(-1, 1, d) + rng.normal(0.0, 0.5, n)))
    return xs, ys


def solution(x: Tensor, y: Tensor) -> Any:
    return np.linalg.lstsq(x.numpy(), y.numpy())[0]


def test_merged_regressions_are_the_pooled_one() -> None:
    xs, ys = regression()
    pooled = solution(torch.cat(xs), torch.cat(ys))
    own, fisher = [], []
    for x, y in zip(xs, ys, strict=True):
        linear = nn.Linear(6, 1, bias=False).double()
        linear.weight.data[0] = torch.tensor(solution(x, y))
        own.append(linear.weight.detach()[0])
        fisher.append(exact_fisher(linear, lambda module, x: module(x), (x,), distribution="gaussian"))
    counts = [len(x) for x in xs]
    informed = [count * f for count, f in zip(counts, fisher, strict=True)]
    assert_near(merge(WeightedMean(by_entry=True), own, informed), pooled, 1e-12)
    normalised = [f / f.norm() for f in informed]
    assert np.abs(merge(WeightedMean(by_entry=True), own, normalised).numpy() - pooled).max() > 1e-3
    assert np.abs(merge(WeightedMean(), own, [float(n) for n in counts]).numpy() - pooled).max() > 1e-3


@pytest.mark.parametrize("normalize", [False, True])
def test_one_round_of_whole_training_is_the_pooled_regression(normalize: bool) -> None:
    xs, ys = regression()
    bounds = np.cumsum([0, *map(len, xs)])
    clients = Clients((torch.cat(xs), torch.cat(ys)), [list(range(a, b)) for a, b in pairwise(bounds)])
    algorithm = FisherAveraging(outputs=lambda module, x, y: module(x), distribution="gaussian", normalize=normalize)

    def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (module(x)[:, 0] - y).square().mean()

    training = LocalTraining(lr=1.0, steps=400, batch_size=None)
    made = Simulation(nn.Linear(6, 1, bias=False).double(), clients, algorithm, training, loss=loss)
    found = train(made, 1)
    error = np.abs(found - solution(torch.cat(xs), torch.cat(ys))).max()
    assert error > 1e-3 if normalize else error < 1e-12


def test_entries_that_tell_nothing_stay() -> None:
    """Of no client's examples; or, with a floor, of too little information."""
    problem = Problem((2, 3, 1))
    for a in problem.a:
        a[:, 4:] = 0.0
    for floor in (0.0, 1e9):
        made = simulation(problem, FisherAveraging(floor=floor), steps=3)
        x = made.server.vector.clone()
        train(made, 2)
        assert torch.equal(made.server.vector[4:], x[4:])
        moved = float((made.server.vector[:4] - x[:4]).abs().min())
        assert moved > 1e-2 if floor == 0 else moved < 1e-6


def test_some_examples_are_drawn_anew_and_again() -> None:
    problem = Problem((40, 50))
    given = {"max_examples": 4, "weighting": "uniform"}
    first, second = (train(simulation(problem, FisherAveraging(**given)), 2) for _ in range(2))
    assert np.array_equal(first, second)
    assert not np.array_equal(first, train(simulation(problem, FisherAveraging(**given), seed=1), 2))
    assert not np.array_equal(first, train(simulation(problem, FisherAveraging()), 2))


# Models of several sizes in a simulation: an algorithm of one's own.


@dataclass(frozen=True)
class Submodels(Algorithm):
    """Client i trains the first entries of the model, and sends which ones."""

    widths: tuple[int, ...]

    @property
    def messages(self) -> tuple[str, ...]:
        return ("mask", "masked")

    def message(self, work: LocalWork) -> dict[str, Tensor]:
        mask = torch.zeros_like(work.pseudo_gradient)
        mask[: self.widths[work.client]] = 1.0
        return {"mask": mask, "masked": mask * work.pseudo_gradient}

    def server_step(self, mean: Any, state: dict[str, Tensor], round: Round) -> Tensor:
        return torch.where(mean["mask"] > 0, mean["masked"] / mean["mask"], 0.0)


def test_submodels_in_a_simulation() -> None:
    problem = Problem((1, 2, 3), dimension=8)
    made = simulation(problem, Submodels((2, 6, 6)), lr=0.3, steps=200)
    x = made.server.vector.numpy().copy()
    found = train(made, 1)
    own = [(a * b).mean(0) / a.mean(0) for a, b in zip(problem.a, problem.b, strict=True)]
    assert_near(found[:2], np.average(own, axis=0, weights=problem.sizes)[:2])
    assert_near(found[2:6], np.average(own[1:], axis=0, weights=problem.sizes[1:])[2:6])
    assert np.array_equal(found[6:], x[6:])
    full = train(simulation(problem, Submodels((8, 8, 8))), 5)
    assert_near(full, train(simulation(problem, FedAvg()), 5))
