"""The methods of `gradwire bench federated --accuracy`, and scikit-learn's digits dealt to clients."""

import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from gradwire.bench import data
from gradwire.comm import EF
from gradwire.compression import QSGD, Identity, TopK
from gradwire.federated import (
    SCAFCOM,
    SCAFFOLD,
    SCALLION,
    Algorithm,
    Clients,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedProx,
    FedYogi,
    Link,
)
from gradwire.federated.partition import dirichlet

CLIENTS, COHORT, STEPS, BATCH_SIZE = 20, 5, 10, 32
HELD_OUT = 360
MIN_SIZE = 10
"""Examples of the smallest client."""
WIDTHS = (64, 32, 10)
NUMEL = 2410
ALPHAS = (100.0, 0.1)
"""Of the Dirichlet distributions: clients nearly alike, and very different."""


@final
@dataclass(frozen=True)
class Method:
    """Something to compare.

    Args:
        algorithm: What clients and server do.
        reference: Accuracy in percent at each of `ALPHAS` that an implementation in NumPy alone has found; None where
            it was not run.
        uplink: Compresses what clients send, where the algorithm does not.
        server_optimizer: In place of a plain step.
    """

    algorithm: Algorithm
    reference: tuple[float | None, float]
    uplink: Link | None = None
    server_optimizer: Callable[[Any], torch.optim.Optimizer] | None = None


_WHOLE = QSGD(levels=1, bucket=NUMEL)

METHODS: Mapping[str, Method] = {
    "FedAvg()": Method(FedAvg(), (98.3, 97.6)),
    "FedProx(mu=0.1)": Method(FedProx(mu=0.1), (98.3, 97.5)),
    "SCAFFOLD()": Method(SCAFFOLD(), (98.4, 98.4)),
    "FedAvg(), FedAdam(lr=0.03)": Method(FedAvg(), (98.5, 98.6), server_optimizer=functools.partial(FedAdam, lr=0.03)),
    "FedAvg(), FedYogi(lr=0.03)": Method(FedAvg(), (98.5, 98.4), server_optimizer=functools.partial(FedYogi, lr=0.03)),
    "FedAvg(), FedAdagrad(lr=0.1)": Method(
        FedAvg(), (98.5, 97.7), server_optimizer=functools.partial(FedAdagrad, lr=0.1)
    ),
    "SCALLION(Identity(), alpha=0.1)": Method(SCALLION(Identity(), alpha=0.1), (98.1, 97.8)),
    "SCALLION(QSGD(15), alpha=0.1)": Method(SCALLION(QSGD(15, bucket=NUMEL), alpha=0.1), (97.8, 97.9)),
    "SCALLION(QSGD(1), alpha=0.1)": Method(SCALLION(_WHOLE, alpha=0.1), (94.9, 83.4)),
    "SCALLION(QSGD(1), alpha=0.02)": Method(SCALLION(_WHOLE, alpha=0.02), (None, 94.3)),
    "SCALLION(QSGD(1, bucket=64), alpha=0.1)": Method(SCALLION(QSGD(1, bucket=64), alpha=0.1), (None, 97.8)),
    "SCAFCOM(TopK(0.01))": Method(SCAFCOM(TopK(ratio=0.01), beta=0.2), (97.0, 96.4)),
    "SCAFCOM(TopK(0.05))": Method(SCAFCOM(TopK(ratio=0.05), beta=0.2), (98.1, 98.0)),
    "FedAvg(), TopK(0.01)": Method(FedAvg(), (96.4, 94.0), uplink=Link(TopK(ratio=0.01))),
    "FedAvg(), TopK(0.01) + EF": Method(FedAvg(), (97.7, 96.2), uplink=Link(TopK(ratio=0.01), EF())),
    "FedAvg(), QSGD(1)": Method(FedAvg(), (98.4, 95.2), uplink=Link(_WHOLE)),
}
"""By name; QSGD without a bucket takes the whole vector for one."""


@functools.lru_cache(8)
def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Images of scikit-learn's digits, `[n, 64]` in [0, 1], and what they show, shuffled; the last ones are held out.

    Raises:
        UsageError: It is not installed.
    """
    images, labels = data.digits("bench federated --accuracy")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    return images[order], labels[order]


def digest() -> str:
    """A hash of the data."""
    both = hashlib.blake2b(digest_size=8)
    for part in digits(0):
        both.update(part.numpy().tobytes())
    return both.hexdigest()


def clients(alpha: float, seed: int) -> Clients:
    """What is not held out, dealt to clients class by class."""
    images, labels = (part[:-HELD_OUT] for part in digits(seed))
    return Clients((images, labels), dirichlet(labels, CLIENTS, alpha, min_size=MIN_SIZE, seed=seed))


def accuracy(module: nn.Module, seed: int) -> Mapping[str, float]:
    """Share of what is held out that is recognised, in percent."""
    images, labels = (part[-HELD_OUT:] for part in digits(seed))
    return {"accuracy": 100 * float((module(images).argmax(1) == labels).double().mean())}


def model(seed: int) -> nn.Module:
    """64-32-10 with tanh; Glorot's initialization."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        module = nn.Sequential(nn.Linear(*WIDTHS[:2]), nn.Tanh(), nn.Linear(*WIDTHS[1:]))
        for layer in (module[0], module[2]):
            nn.init.xavier_normal_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return module
