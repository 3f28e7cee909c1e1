"""What the tests of optimizers share: parameters of many shapes, reproducible training, exact comparison."""

from typing import Any

import pytest
import torch
from cases import OPTIMIZERS, SERVER_OPTIMIZERS, OptimizerCase
from torch import Tensor, nn

SHAPES = [(6, 5), (5,), (4, 3, 3, 3), (2, 6, 7), ()]

CASES = OPTIMIZERS + SERVER_OPTIMIZERS

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.cls.__name__}-{case.kwargs}")
every_class = pytest.mark.parametrize(
    "case", list({case.cls: case for case in reversed(CASES)}.values()), ids=lambda case: case.cls.__name__
)
eager = pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])


def make(case: OptimizerCase, params: Any, **options: Any) -> Any:
    return case.cls(params, **{"lr": 1e-2, **case.kwargs, **options})


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in SHAPES]


def clones(params: list[nn.Parameter], dtype: torch.dtype | None = None) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone().to(dtype or p.dtype)) for p in params]


def train(optimizer: Any, params: list[nn.Parameter], steps: int = 5, seed: int = 0, scale: float = 1.0) -> None:
    """Steps with gradients that only depend on the seed and the shapes."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float64) * scale).to(p.dtype)
        optimizer.step()


def assert_equal(actual: list[Any], expected: list[Any], **tolerance: Any) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.detach(), e.detach(), **(tolerance or {"rtol": 0.0, "atol": 0.0}))


def tensors(optimizer: Any, params: list[nn.Parameter]) -> list[Tensor]:
    """Copies of parameters and state."""
    return [x.detach().clone() for p in params for x in (p, *optimizer.state[p].values())]


def shaped(optimizer: Any, param: Tensor) -> dict[str, Tensor]:
    """State tensors of the parameter's shape."""
    state = optimizer.state[param]
    return {name: x for name, x in state.items() if name != "step" and x.shape == param.shape}
