"""The work that simulators are compared on: data, clients, model, and who takes part in which round.

Everything follows from a `Work`, so that processes that share nothing do the same.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradwire.federated import Clients, Engine, FedAvg, LocalTraining, Simulation
from gradwire.federated.partition import dirichlet

CLASSES, SIDE = 10, 28
_NOISE = 0.5


@final
@dataclass(frozen=True)
class Work:
    """Federated averaging with plain SGD, one epoch per client and round, in the order of the examples.

    Args:
        model: "mlp", 784-75-10 with ReLU, or "lenet", LeNet-5.
        clients: In all.
        cohort: In every round.
        rounds: Of one pass, >= 2; the first one is not counted.
        examples: Synthetic images of 28 x 28, in ten classes.
    """

    model: Literal["mlp", "lenet"]
    clients: int
    cohort: int
    rounds: int
    examples: int = 20_000
    batch_size: int = 16
    lr: float = 0.05
    alpha: float = 0.3

    def module(self) -> nn.Module:
        """The model, with its first weights."""
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            return _mlp() if self.model == "mlp" else _lenet()

    @property
    def schedule(self) -> list[list[int]]:
        """Clients of every round."""
        draw = _simulation(self, None)
        return [draw.cohort(round) for round in range(self.rounds)]

    def examples_of(self, client: int) -> tuple[Tensor, Tensor]:
        """Images and labels of a client."""
        images, labels = all_clients(self).examples(client)
        return images, labels

    def simulation(self, engine: Engine | None = None) -> Simulation:
        """The same in gradwire."""
        return _simulation(self, engine)


WORKS: dict[str, Work] = {
    "mlp-100": Work("mlp", clients=100, cohort=10, rounds=20),
    "mlp-1000": Work("mlp", clients=1000, cohort=100, rounds=12),
    "lenet-100": Work("lenet", clients=100, cohort=10, rounds=12),
}
QUICK_WORKS: dict[str, Work] = {
    "mlp-100": Work("mlp", clients=10, cohort=2, rounds=3, examples=200),
    "lenet-100": Work("lenet", clients=10, cohort=2, rounds=3, examples=200),
}


@functools.lru_cache(1)
def all_clients(work: Work) -> Clients:
    """Images and labels, dealt to clients by a Dirichlet distribution over clients for every class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (work.examples,), generator=generator)
    prototypes = torch.randn(CLASSES, SIDE * SIDE, generator=generator)
    images = torch.randn(work.examples, SIDE * SIDE, generator=generator)
    images = images.mul_(_NOISE).add_(prototypes[labels])
    if work.model == "lenet":
        images = images.view(-1, 1, SIDE, SIDE)
    partition = dirichlet(labels, work.clients, work.alpha)
    return Clients((images, labels), partition)


def model_size(work: Work) -> int:
    """Parameters of its model."""
    return sum(parameter.numel() for parameter in work.module().parameters())


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector, detached."""
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def cross_entropy(module: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The mean loss of a batch."""
    return F.cross_entropy(module(images), labels)


def _simulation(work: Work, engine: Engine | None) -> Simulation:
    return Simulation(
        work.module(),
        all_clients(work),
        FedAvg(),
        LocalTraining(lr=work.lr, batch_size=work.batch_size, shuffle=False),
        loss=cross_entropy,
        cohort_size=work.cohort,
        engine=engine,
    )


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(SIDE * SIDE, 75), nn.ReLU(), nn.Linear(75, CLASSES))


def _lenet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, CLASSES),
    )
