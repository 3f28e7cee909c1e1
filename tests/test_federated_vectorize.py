"""Clients that are trained at once: the same models as one after the other, up to rounding, and refusals."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwire.compression import TopK
from gradwire.federated import (
    SCAFCOM,
    SCAFFOLD,
    Algorithm,
    Clients,
    CoordinateMedian,
    FedAvg,
    FedDyn,
    FedNova,
    FedProx,
    Link,
    LocalTraining,
    RoundRecord,
    Simulation,
)
from gradwire.federated.client_runner import ClientRunner
from gradwire.federated.vectorize import STACK, StackedTrainer, expected_gain

SIZES = [1, 2, 3, 3, 5, 8, 8, 8, 8, 9, 11, 13, 16, 16, 16, 16, 16, 21, 24, 30]


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()


class Tied(nn.Module):
    """Two layers of one weight, a frozen bias, and a parameter that the loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(5, 5).double()
        self.second = nn.Linear(5, 5).double()
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.first(x).tanh())
        return hidden[:, :3]


def cross_entropy(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(module(x), y)


def clients(sizes: list[int] = SIZES) -> Clients:
    count = sum(sizes)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(count, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (count,), generator=generator)
    return Clients((x, y), list(torch.arange(count).split(sizes)))


def run(
    vectorize: Any,
    algorithm: Algorithm,
    training: LocalTraining,
    module: Callable[[], nn.Module] = mlp,
    rounds: int = 3,
    sizes: list[int] = SIZES,
    loss: Callable[..., Tensor] = cross_entropy,
    **options: Any,
) -> tuple[Simulation, list[RoundRecord]]:
    options = {"cohort_size": min(16, len(sizes))} | options
    made = Simulation(module(), clients(sizes), algorithm, training, loss=loss, vectorize=vectorize, **options)
    return made, list(made.run(rounds))


def assert_same(one: tuple[Simulation, list[RoundRecord]], two: tuple[Simulation, list[RoundRecord]]) -> None:
    (first, records), (second, others) = one, two
    torch.testing.assert_close(first.server.vector, second.server.vector, rtol=1e-12, atol=1e-12)
    for client in range(len(first.clients)):
        for name, value in first.store.get(client).items():
            torch.testing.assert_close(value, second.store.get(client)[name], rtol=1e-10, atol=1e-12)
    for record, other in zip(records, others, strict=True):
        assert record.loss == pytest.approx(other.loss, rel=1e-12)
        assert (record.participants, record.bytes_up) == (other.participants, other.bytes_up)


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Clients of every stack that was trained."""
    found: list[int] = []
    train = StackedTrainer.run

    def counted(self: StackedTrainer, start: Tensor, batches: Any, *args: Any, **options: Any) -> Any:
        found.append(len(batches))
        return train(self, start, batches, *args, **options)

    monkeypatch.setattr(StackedTrainer, "run", counted)
    return found


TRAININGS = {
    "epoch": LocalTraining(lr=0.1, batch_size=4),
    "epochs": LocalTraining(lr=0.1, batch_size=8, epochs=2),
    "steps": LocalTraining(lr=0.1, batch_size=8, steps=5),
    "unequal steps": LocalTraining(lr=0.1, batch_size=8, steps=lambda round, client: 1 + (round + client) % 4),
    "whole": LocalTraining(lr=0.1, batch_size=None, steps=2),
    "in order": LocalTraining(lr=0.1, batch_size=4, shuffle=False),
    "clipped": LocalTraining(lr=0.1, batch_size=4, max_norm=0.3),
    "lr by round": LocalTraining(lr=lambda round: 0.1 / (1 + round), batch_size=4),
    "momentum": LocalTraining(lr=0.1, batch_size=4, momentum=0.9),
    "weight decay": LocalTraining(lr=0.1, batch_size=4, momentum=0.5, weight_decay=0.1, max_norm=0.5),
}


@pytest.mark.parametrize("alone", [2, 10])
@pytest.mark.parametrize("name", TRAININGS)
def test_equals_one_after_the_other(name: str, alone: int, stacks: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradwire.federated.vectorize._ALONE", alone)  # groups from so many on go through torch.func
    together = run(True, FedAvg(), TRAININGS[name])
    assert stacks == [16] * 3
    assert_same(together, run(False, FedAvg(), TRAININGS[name]))
    assert stacks == [16] * 3


ALGORITHMS: dict[str, tuple[Algorithm, dict[str, Any]]] = {
    "FedProx": (FedProx(0.5), {}),
    "SCAFFOLD": (SCAFFOLD(), {}),
    "FedDyn": (FedDyn(0.1), {}),
    "FedNova": (FedNova(), {}),
    "SCAFCOM": (SCAFCOM(TopK(ratio=0.2)), {}),
    "uplink": (FedAvg(), {"uplink": Link(TopK(ratio=0.2))}),
    "median": (FedAvg("uniform"), {"aggregator": CoordinateMedian()}),
    "dropout of clients": (SCAFFOLD(), {"dropout": 0.3}),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_algorithms(name: str, stacks: list[int]) -> None:
    algorithm, options = ALGORITHMS[name]
    together = run(True, algorithm, TRAININGS["epoch"], **options)
    assert len(stacks) == 3
    assert_same(together, run(False, algorithm, TRAININGS["epoch"], **options))


def test_tied_frozen_and_unused_parameters() -> None:
    training = LocalTraining(lr=0.1, batch_size=4, momentum=0.5)
    together, alone = run(True, FedAvg(), training, Tied), run(False, FedAvg(), training, Tied)
    assert_same(together, alone)
    assert together[0].model.numel == 25 + 5 + 2


def test_cohort_of_several_stacks(stacks: list[int]) -> None:
    sizes = [4] * (2 * STACK + 4)
    options: dict[str, Any] = {"rounds": 1, "sizes": sizes, "cohort_size": len(sizes)}
    together = run(True, SCAFFOLD(), TRAININGS["epoch"], **options)
    assert len(stacks) == 3
    assert sum(stacks) == len(sizes)
    assert max(stacks) - min(stacks) <= 1
    assert_same(together, run(False, SCAFFOLD(), TRAININGS["epoch"], **options))


def test_module_is_as_before_between_rounds() -> None:
    simulation, _ = run(True, FedAvg(), TRAININGS["epoch"], rounds=2)
    flat = torch.cat([parameter.detach().flatten() for parameter in simulation.module.parameters()])
    torch.testing.assert_close(flat, simulation.server.vector, rtol=0, atol=0)


def test_client_that_is_not_finite_does_not_reach_the_others() -> None:
    def poisoned(vectorize: bool) -> tuple[Simulation, list[RoundRecord]]:
        everyone = clients()
        everyone.examples(7)[0].fill_(float("nan"))
        made = Simulation(mlp(), everyone, SCAFFOLD(), TRAININGS["epoch"], loss=cross_entropy, vectorize=vectorize)
        return made, list(made.run(2))

    together = poisoned(True)
    assert [record.not_finite for record in together[1]] == [1, 1]
    assert_same(together, poisoned(False))


class WithDropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), 0.5)


def with_buffers() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()


def branching(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    loss = cross_entropy(module, x, y)
    return loss if loss.item() > 0 else 2 * loss


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"module": WithDropout}, "torch.func"),
        ({"module": with_buffers}, "buffers"),
        ({"loss": branching}, "torch.func"),
        ({"training": LocalTraining(lr=0.1, batch_size=4, optimizer=lambda p: torch.optim.Adam(p))}, "optimizer"),
        ({"algorithm": SCAFFOLD(option="I")}, "SCAFFOLD"),
    ],
)
def test_refusals(options: dict[str, Any], why: str, stacks: list[int]) -> None:
    options = {"algorithm": FedAvg(), "training": TRAININGS["epoch"], "sizes": [8] * 20, "rounds": 2} | options
    with pytest.raises(ValueError, match=rf"Simulation: expected clients that can be .*{why}(.|\n)*Set vectorize"):
        run(True, **options)
    by_itself = run("auto", **options)
    assert not stacks
    torch.testing.assert_close(
        by_itself[0].server.vector, run(False, **options)[0].server.vector, rtol=0, atol=0, equal_nan=True
    )


def test_auto(stacks: list[int]) -> None:
    def stacked(**options: Any) -> bool:
        stacks.clear()
        options = {"sizes": [8] * 20, "rounds": 1, "cohort_size": 20} | options
        run("auto", FedAvg(), TRAININGS["epoch"], **options)
        return bool(stacks)

    def wide() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 2000), nn.Linear(2000, 3)).double()

    def convolution() -> nn.Module:
        return nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 5), nn.Flatten()).double()

    assert stacked()
    assert not stacked(cohort_size=10)
    assert not stacked(sizes=list(range(1, 21)))
    assert not stacked(module=wide)
    assert not stacked(module=convolution)


def test_expected_gain_counts_calls() -> None:
    def call(clients: int) -> float:
        return 9 + clients / 4

    assert expected_gain([3] * 20, [12] * 20, batch_size=4) == 20 / call(20)
    assert expected_gain([1] * 9, [4] * 9, batch_size=4) == 1  # nine go one by one
    assert expected_gain([2] * 12 + [1] * 12, [8] * 12 + [4] * 12, batch_size=4) == 36 / (call(24) + call(12))
    assert expected_gain([2] * 24, [8, 7] * 12, batch_size=4) == 48 / (call(24) + 2 * call(12))
    assert expected_gain([2] * 24, [3, 4] * 12, batch_size=None) == 48 / (4 * call(12))
    assert expected_gain([4] * 20, [6] * 20, batch_size=4) == 20 / call(20)
    assert expected_gain([0, 0], [0, 3], batch_size=None) == 1


def test_error_in_a_stack_is_told_of_its_client() -> None:
    def fails(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        if x.shape[0] == 3:
            raise RuntimeError("three is too few")
        return cross_entropy(module, x, y)

    with pytest.warns(UserWarning, match="trained one by one, since all at once raised RuntimeError: three is too few"):
        simulation, records = run(
            True, FedAvg(), LocalTraining(lr=0.1, batch_size=None), loss=fails, on_error="skip", cohort_size=len(SIZES)
        )
    assert {client: SIZES[client] for client in records[-1].failures} == {2: 3, 3: 3}
    assert records[-1].participants == len(SIZES) - 2
    assert isinstance(simulation.runner, ClientRunner)
