"""Small simulations that several test files run: whole, on several ranks, and in pieces."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradwire.comm.feedback import EF, EF21
from gradwire.compression import QSGD, TopK
from gradwire.federated import (
    SCAFCOM,
    SCAFFOLD,
    Clients,
    FedAdam,
    FedAvg,
    FedNova,
    Link,
    LocalTraining,
    RoundRecord,
    Simulation,
)
from gradwire.federated.aggregators.base import Individual

N = 12


class Middle(Individual):
    """The lower median of every entry: it needs single messages, and remembers its last result."""

    last: Tensor | None = None

    def result(self) -> Tensor:
        now = self.stacked.median(0).values
        self.last = now if self.last is None else 0.5 * (self.last + now)
        return self.last.clone()

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.last is None else {"last": self.last}

    def load_state_dict(self, saved: Any) -> None:
        self.last = saved["last"].clone() if "last" in saved else None


class Net(nn.Sequential):
    """Six inputs, three classes; with dropout and BatchNorm if asked for."""

    def __init__(self, *, norm: bool = False, dropout: float = 0.0) -> None:
        middle: list[nn.Module] = [nn.BatchNorm1d(5)] if norm else []
        super().__init__(nn.Linear(6, 5), *middle, nn.Tanh(), nn.Dropout(dropout), nn.Linear(5, 3))


def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(module(x), y)


def clients(dtype: torch.dtype = torch.float32) -> Clients:
    """Clients of very different sizes."""
    generator = torch.Generator().manual_seed(7)
    sizes = [(4, 6, 11, 15)[i % 4] for i in range(N)]  # no batch of a single example
    x = torch.randn(sum(sizes), 6, generator=generator, dtype=dtype)
    y = torch.randint(3, (sum(sizes),), generator=generator)
    return Clients((x, y), torch.split(torch.arange(sum(sizes)), sizes))


def evaluate(module: nn.Module) -> dict[str, float]:
    x = torch.linspace(-1, 1, 24, dtype=next(module.parameters()).dtype).view(4, 6)
    return {"sum": float(module(x).sum())}


Make = Callable[[], dict[str, Any]]
CASES: dict[str, Make] = {
    "fedavg": lambda: {"algorithm": FedAvg(), "dropout": 0.3},
    "fednova": lambda: {"algorithm": FedNova(), "server_optimizer": lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.5)},
    "fedadam": lambda: {"algorithm": FedAvg(), "server_optimizer": lambda p: FedAdam(p, lr=0.03), "norm": True},
    "scaffold": lambda: {"algorithm": SCAFFOLD()},
    "scafcom": lambda: {"algorithm": SCAFCOM(TopK(ratio=0.2)), "dropout": 0.2},
    "uplink": lambda: {"algorithm": FedAvg(), "uplink": Link(TopK(ratio=0.2), EF()), "module_dropout": 0.3},
    "ef21": lambda: {"algorithm": FedAvg("uniform"), "uplink": Link(TopK(ratio=0.2), EF21())},
    "median": lambda: {"algorithm": FedAvg(), "aggregator": Middle(), "norm": True},
    "downlink": lambda: {
        "algorithm": FedAvg(),
        "downlink": Link(TopK(ratio=0.3)),
        "uplink": Link(QSGD(levels=15)),
        "norm": True,
        "buffers": "local",
    },
    "pooled": lambda: {"algorithm": SCAFFOLD(), "norm": True, "buffers": "pooled"},
}


def make(case: str, dtype: torch.dtype = torch.float32, **other: Any) -> Simulation:
    """The simulation of a case, always from the same start."""
    arguments = {"cohort_size": 5, "seed": 3, "evaluate": evaluate, **CASES[case](), **other}
    torch.manual_seed(11)
    module = Net(norm=arguments.pop("norm", False), dropout=arguments.pop("module_dropout", 0.0)).to(dtype)
    training = arguments.pop("training", LocalTraining(lr=0.2, epochs=2, batch_size=4))
    algorithm = arguments.pop("algorithm")
    return Simulation(module, clients(dtype), algorithm, training, loss=loss, **arguments)


def digest(values: Sequence[Tensor]) -> str:
    """A hash of all bits."""
    total = hashlib.sha256()
    for value in values:
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def told(records: Sequence[RoundRecord]) -> list[Any]:
    """Records as plain values, NaN as text."""
    return [
        [r.round, repr(r.loss), dict(r.metrics), r.bytes_up, r.bytes_down, r.participants, r.lost, dict(r.failures)]
        for r in records
    ]


def outcome(simulation: Simulation, rounds: int) -> tuple[list[Any], str, str]:
    """Records, and hashes of model, buffers and server's vectors."""
    records = told(list(simulation.run(rounds)))
    model = digest([*simulation.module.parameters(), *simulation.module.buffers()])
    return records, model, digest(list(simulation.server.state.values()))


def client_digests(simulation: Simulation) -> dict[int, str]:
    """A hash of what each client keeps, of those that this rank keeps."""
    return {client: digest(list(simulation.store.get(client).values())) for client in simulation.store.touched}


def folder(path: str | None) -> Path | None:
    return None if path is None else Path(path)
