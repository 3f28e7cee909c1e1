"""What the experiments on theory minimise: functions of n workers, with the constants that theory asks for."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from gradwire.bench.errors import UsageError
from gradwire.comm import Communicator, ErrorFeedback, Plan, Simulated
from gradwire.compression import Compressor

Gradients = Callable[[Tensor], Tensor]
"""Points `[runs, d]` to the gradients of all workers there, `[n, runs, d]`."""


def communicator(compressor: Compressor, feedback: ErrorFeedback | None, workers: int, seed: int = 0) -> Communicator:
    """Of n workers in this process, with everything compressed."""
    everything = Plan(min_ndim=0, min_numel=0)
    return Communicator(compressor, feedback=feedback, exchange=Simulated(workers), plan=everything, seed=seed)


def descend(
    average: Communicator,
    gradients: Gradients,
    x: Tensor,
    lr: Tensor | float,
    steps: int,
    measure: Callable[[Tensor], Tensor],
    *,
    every: int = 1,
    target: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Gradient descent on averaged gradients; several runs go on at once, as rows that compressors treat alone.

    Args:
        average: Makes workers' gradients their mean.
        gradients: Of all workers.
        x: Where to start, `[runs, d]`.
        lr: Step size, of all runs or `[runs, 1]`.
        steps: At most.
        measure: Points `[runs, d]` to one number each, `[runs]`.
        every: Steps between measurements.
        target: Stop when no run measures more.

    Returns:
        The last points, and the measurements `[1 + steps // every, runs]`, the first at the start.
    """
    measured = [measure(x)]
    for step in range(1, steps + 1):
        grads = gradients(x)
        average.average_([grads], ["x"])
        x = x - lr * (grads[0] if average.workers > 1 else grads)
        if step % every == 0:
            measured.append(measure(x))
            if float(measured[-1].max()) <= target:
                break
    return x, torch.stack(measured)


@final
@dataclass(frozen=True, eq=False)
class Quadratic:
    """f_i(x) = <x, H_i x> / 2 - <b_i, x> with diagonal H_i.

    Args:
        curvature: Diagonals of the H_i, `[n, d]`, >= 0.
        slope: The b_i, `[n, d]`.
    """

    curvature: Tensor
    slope: Tensor

    def gradients(self, x: Tensor) -> Tensor:
        """H_i x - b_i."""
        return self.curvature[:, None] * x - self.slope[:, None]

    @property
    def smoothness(self) -> float:
        """Of the mean."""
        return float(self.curvature.mean(dim=0).max())

    @property
    def each_smoothness(self) -> Tensor:
        """Of every worker, `[n]`."""
        return self.curvature.amax(dim=1)


@final
@dataclass(frozen=True, eq=False)
class Logistic:
    """f_i(x) = mean_j log(1 + exp(-<a_ij, x>)) + ridge/2 |x|^2 + rough sum_k x_k^2 / (1 + x_k^2), labels in the a_ij.

    Args:
        features: The a_ij, `[n, m, d]`; zero where a worker has fewer than m.
        weights: `[n, m]`: one over the worker's number of examples, or zero where there is none.
        ridge: >= 0.
        rough: >= 0; not convex, as in the experiments on EF21.
    """

    features: Tensor
    weights: Tensor
    ridge: float = 0.0
    rough: float = 0.0

    def gradients(self, x: Tensor) -> Tensor:
        """Of all workers."""
        shares = self.weights[:, None] * torch.sigmoid(-x @ self.features.mT)
        return (self.ridge + 2 * self.rough / (1 + x.square()).square()) * x - shares @ self.features

    @property
    def smoothness(self) -> float:
        """Of the mean."""
        return float(_largest(self._grams().mean(dim=0))) + self._regularity

    @property
    def each_smoothness(self) -> Tensor:
        """Of every worker, `[n]`."""
        return _largest(self._grams()) + self._regularity

    def minimum(self) -> Tensor:
        """Where the mean is least, `[d]`, by Newton's method; with `ridge` alone."""
        assert self.ridge > 0
        assert self.rough == 0
        n, _, d = self.features.shape
        x = torch.zeros(1, d, dtype=self.features.dtype)
        for _ in range(50):
            share = torch.sigmoid(-x @ self.features.mT)[:, 0]
            curved = (self.weights * share * (1 - share))[..., None] * self.features
            hessian = (self.features.mT @ curved).sum(dim=0) / n + self.ridge * torch.eye(d, dtype=x.dtype)
            x = x - torch.linalg.solve(hessian, self.gradients(x).mean(dim=0)[0])
        return x[0]

    def _grams(self) -> Tensor:
        """Bounds of the data's Hessians, `[n, d, d]`."""
        return self.features.mT @ (self.weights[..., None] * self.features) / 4

    @property
    def _regularity(self) -> float:
        return self.ridge + 2 * self.rough


def classes(name: str) -> tuple[Tensor, Tensor]:
    """Features `[m, d]` float64 and labels `[m]` of scikit-learn's `breast_cancer`, `digits` or `diabetes`.

    That of diabetes is how far the disease has gone, a number.

    Raises:
        UsageError: It is not installed.
    """
    try:
        load = getattr(importlib.import_module("sklearn.datasets"), f"load_{name}")
    except ImportError:
        raise UsageError(
            f"bench theory: expected scikit-learn for its {name} data, found none. Install it: pip install "
            "scikit-learn, or choose --claims counterexample econtrol saddle walk."
        ) from None
    data = load()
    return torch.tensor(data.data, dtype=torch.float64), torch.tensor(data.target)


def standardised(x: Tensor) -> Tensor:
    """Every feature with mean 0 and variance 1; one that is constant is 0."""
    spread = x.std(dim=0, correction=0)
    return (x - x.mean(dim=0)) / torch.where(spread > 0, spread, 1)


def dealt(x: Tensor, order: Tensor, workers: int) -> tuple[Tensor, Tensor]:
    """Deal rows of `x [m, d]` in this order, as evenly as can be: features and weights as `Logistic` takes them."""
    parts = list(torch.tensor_split(x[order.argsort(stable=True)], workers))
    features = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    sizes = torch.tensor([len(part) for part in parts])
    weights = (torch.arange(features.shape[1]) < sizes[:, None]) / sizes[:, None]
    return features, weights.to(x.dtype)


def _largest(symmetric: Tensor) -> Tensor:
    eigenvalues: Tensor = torch.linalg.eigvalsh(symmetric)
    return eigenvalues[..., -1]
