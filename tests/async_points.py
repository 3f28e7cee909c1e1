"""Points on a line, trained asynchronously: for tests."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from gradwire.federated import (
    AsyncPolicy,
    AsyncSimulation,
    Clients,
    ClientTimes,
    FedAvg,
    FixedTimes,
    LocalTraining,
)

B, TAU, P = (0.0, 1.0, 2.0, 10.0), (1.0, 2.0, 3.0, 6.0), (0.4, 0.3, 0.2, 0.1)
UNIFORM = (0.25,) * 4


class Point(nn.Module):
    """One number, x."""

    def __init__(self, x: float = 0.0) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([x], dtype=torch.float64))


def points(
    policy: AsyncPolicy,
    times: ClientTimes | None = None,
    *,
    p: Sequence[float] = P,
    lr: float = 0.01,
    start: float = 5.0,
    b: Sequence[float] = B,
    **options: Any,
) -> AsyncSimulation:
    """Clients with f_i(x) = (x - b_i)^2 / 2 and one local step."""
    options.setdefault("algorithm", FedAvg(weighting=lambda client, count: p[client]))
    rows = torch.tensor(b, dtype=torch.float64)[:, None]
    return AsyncSimulation(
        Point(start),
        Clients((rows,), [[client] for client in range(len(b))]),
        training=LocalTraining(lr=lr, steps=1, batch_size=None),
        loss=lambda module, target: ((module.x - target) ** 2).sum() / 2,
        policy=policy,
        times=FixedTimes(TAU) if times is None else times,
        **options,
    )


def path(made: AsyncSimulation, rounds: int) -> np.ndarray:
    return np.array([made.module.x.item() for _ in made.run(rounds)])


def settled(made: AsyncSimulation, rounds: int) -> float:
    """The mean of x over the second half."""
    return float(path(made, rounds)[rounds // 2 :].mean())
