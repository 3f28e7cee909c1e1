"""Quadratic problems for tests of federated algorithms: simulations of them, and runs of their references."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from cases import AlgorithmCase
from numpy.typing import NDArray
from reference.federated import Run
from torch import Tensor, nn

from gradwire.compression import counter_rng
from gradwire.compression.base import Compressor
from gradwire.federated import Algorithm, Clients, LocalTraining, Simulation

Array = NDArray[np.float64]


class Problem:
    """Clients of `sizes` rows each, f_i(x) = mean over rows of 1/2 (x - b)^T diag(a) (x - b)."""

    def __init__(self, sizes: Sequence[int] = (3, 1, 4, 2, 5, 2, 3), dimension: int = 12) -> None:
        rng = np.random.default_rng(0)
        self.sizes, self.dimension = list(sizes), dimension
        self.a: list[Array] = [rng.uniform(0.5, 2.0, (size, dimension)) for size in sizes]
        self.b: list[Array] = [rng.normal(0.0, 3.5, (size, dimension)) for size in sizes]

    def gradient(self, client: int, x: Array) -> Array:
        """Of f_i."""
        gradient: Array = (self.a[client] * (x - self.b[client])).mean(axis=0)
        return gradient

    def optimum(self, p: Sequence[float]) -> Array:
        """The minimum of sum_i p_i f_i."""
        pairs = list(zip(p, self.a, self.b, strict=True))
        best: Array = sum(w * (a * b).mean(0) for w, a, b in pairs) / sum(w * a.mean(0) for w, a, _ in pairs)
        return best

    def clients(self) -> Clients:
        """Rows (a, b) of every client."""
        ends = np.cumsum([0, *self.sizes])
        rows = [range(first, last) for first, last in pairwise(ends.tolist())]
        return Clients((torch.tensor(np.concatenate(self.a)), torch.tensor(np.concatenate(self.b))), rows)


class Point(nn.Module):
    """x, in float64, zero at first."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(dimension, dtype=torch.float64))


def quadratic(model: Any, a: Tensor, b: Tensor) -> Tensor:
    """The mean loss of rows."""
    loss: Tensor = 0.5 * (a * (model.x - b) ** 2).sum(1).mean()
    return loss


def falling(round: int) -> float:
    """A learning rate."""
    return 0.1 * 0.95**round


def unequal(round: int, client: int) -> int:
    """Steps of clients that do not all get equally far."""
    return 1 + (round + 2 * client) % 4


def weights(algorithm: Algorithm, problem: Problem) -> list[float]:
    """p_i."""
    return [algorithm.weight(client, size) for client, size in enumerate(problem.sizes)]


def simulation(
    problem: Problem,
    algorithm: Algorithm,
    *,
    lr: Any = 0.1,
    steps: Any = 4,
    training: dict[str, Any] | None = None,
    loss: Any = quadratic,
    **options: Any,
) -> Simulation:
    """Whole batches, in order, unless `training` says otherwise."""
    local = {"lr": lr, "steps": steps, "batch_size": None, "shuffle": False} | (training or {})
    return Simulation(
        Point(problem.dimension), problem.clients(), algorithm, LocalTraining(**local), loss=loss, **options
    )


def case_simulation(case: AlgorithmCase, problem: Problem, **options: Any) -> Simulation:
    """Three clients a round that do not all get equally far, with a falling lr, as far as the case allows."""
    cohort_size = None if case.everyone else 3
    given: dict[str, Any] = {"cohort_size": cohort_size, "server_lr": case.server_lr, "seed": 5} | options
    steps = 4 if case.equal_steps else unequal
    return simulation(problem, case.algorithm, lr=falling, steps=steps, training=case.training, **given)


def reference_run(made: Simulation, problem: Problem, rounds: int, **options: Any) -> Run:
    """The same for a reference."""
    training = made.training
    steps = training.steps if callable(training.steps) else lambda round, client: training.steps
    return Run(
        a=problem.a,
        b=problem.b,
        weights=weights(made.algorithm, problem),
        cohorts=[made.cohort(round) for round in range(rounds)],
        steps=steps,
        lr=training.lr_at,
        start=made.server.vector.numpy().copy(),
        server_lr=made.server.lr,
        momentum=training.momentum,
        **options,
    )


def arriving(
    compressor: Compressor, compress: Callable[..., Any], seed: int, message: str
) -> Callable[[int, int, Array], Array]:
    """What arrives of a vector, by a NumPy reference of the compressor on rows and the draws of a simulation."""

    def arrive(round: int, client: int, vector: Array) -> Array:
        width = compressor.row_width(torch.Size(vector.shape))
        rows = np.pad(vector, (0, -len(vector) % width)).reshape(-1, width)
        if compressor.randomness == "none":
            return np.asarray(compress(rows)).reshape(-1)[: len(vector)]
        keys = counter_rng.row_keys(counter_rng.fold(seed, round, client, message), len(rows)).numpy()
        return np.asarray(compress(rows, keys=keys)).reshape(-1)[: len(vector)]

    return arrive


def train(made: Simulation, rounds: int) -> Array:
    """x after so many more rounds."""
    for _ in made.run(rounds):
        pass
    x: Array = made.server.vector.numpy().copy()
    return x
