"""Simulations on one GPU: the same models as on the CPU, dropout by the seed, clients trained at once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gradwire.comm import EF
from gradwire.compression import TopK
from gradwire.federated import (
    SCAFCOM,
    SCAFFOLD,
    Clients,
    CoordinateMedian,
    FedAdam,
    FedAvg,
    Link,
    LocalTraining,
    Simulation,
)

pytestmark = pytest.mark.gpu


def simulation(device: str, algorithm: Any = None, dropout: float = 0.0, **options: Any) -> Simulation:
    torch.manual_seed(0)
    inputs, targets = torch.randn(200, 12), torch.randint(3, (200,))
    clients = Clients((inputs.double(), targets), torch.arange(200).chunk(8)).to(device)
    module = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double().to(device)
    return Simulation(
        module,
        clients,
        algorithm or FedAvg(),
        LocalTraining(lr=0.1, steps=3, batch_size=10),
        loss=lambda model, x, y: nn.functional.cross_entropy(model(x), y),
        cohort_size=5,
        **options,
    )


def train(made: Simulation) -> torch.Tensor:
    for _ in made.run(4):
        pass
    return made.server.vector.cpu()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vectorize": True},
        {"algorithm": SCAFFOLD()},
        {"algorithm": SCAFCOM(TopK(ratio=0.1))},
        {"uplink": Link(TopK(ratio=0.1), EF())},
        {"downlink": Link(TopK(ratio=0.5))},
        {"aggregator": CoordinateMedian()},
        {"server_optimizer": lambda parameters: FedAdam(parameters, lr=0.03)},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_equals_the_cpu(options: dict[str, Any]) -> None:
    torch.testing.assert_close(train(simulation("cuda", **options)), train(simulation("cpu", **options)))


def test_dropout_follows_from_the_seed() -> None:
    first = train(simulation("cuda", dropout=0.5))
    state = torch.cuda.get_rng_state()
    second = simulation("cuda", dropout=0.5)
    torch.cuda.manual_seed(123)
    assert torch.equal(first, train(second))
    torch.cuda.set_rng_state(state)
    assert not torch.equal(first, train(simulation("cuda", dropout=0.5, seed=1)))


def test_resumes_to_the_bit(tmp_path: Path) -> None:
    whole = simulation("cuda", SCAFFOLD())
    train(whole)
    expected = train(whole)
    first, second = simulation("cuda", SCAFFOLD()), simulation("cuda", SCAFFOLD())
    train(first)
    first.save(tmp_path / "run")
    second.load(tmp_path / "run")
    assert torch.equal(train(second), expected)
