"""The federated core: clients' batches, flat models, and local training against loops written out in float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gradwire.federated import (
    SCAFFOLD,
    Clients,
    FedAvg,
    FedProx,
    FlatModel,
    LocalTrainer,
    LocalTraining,
    Simulation,
    WeightedMean,
)

SIZES = [5, 1, 8, 3, 12, 7]


def mlp() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def mse(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.mse_loss(module(x), y)


def rows(count: int = sum(SIZES)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(count, 4, dtype=torch.float64, generator=generator)
    return x, torch.randn(count, 2, dtype=torch.float64, generator=generator)


def clients() -> Clients:
    return Clients(rows(), list(torch.arange(sum(SIZES)).split(SIZES)))


def simulation(module: nn.Module | None = None, **options: Any) -> Simulation:
    options = {"algorithm": FedAvg(), "training": LocalTraining(lr=0.1, batch_size=4), "loss": mse} | options
    algorithm, training = options.pop("algorithm"), options.pop("training")
    everyone = options.pop("clients", None) or clients()
    return Simulation(mlp() if module is None else module, everyone, algorithm, training, **options)


class TestClients:
    """Rows are dealt, not changed."""

    def test_examples_are_views_of_one_copy(self) -> None:
        x, y = torch.arange(6.0), torch.arange(6)
        made = Clients((x, y), [[5, 0], [], torch.tensor([3, 1, 2])])
        assert made.num_examples == [2, 0, 3]
        assert len(made) == 3
        assert [part.tolist() for part in made.examples(2)] == [[3.0, 1.0, 2.0], [3, 1, 2]]
        assert made.examples(0)[0].untyped_storage().data_ptr() == made.examples(2)[0].untyped_storage().data_ptr()
        assert made.examples(0)[0].untyped_storage().data_ptr() != x.untyped_storage().data_ptr()

    def test_a_row_may_belong_to_several_clients_and_twice_to_one(self) -> None:
        made = Clients((torch.arange(4.0),), [[1, 1, 2], [2, 1]])
        assert [made.examples(c)[0].tolist() for c in (0, 1)] == [[1.0, 1.0, 2.0], [2.0, 1.0]]

    @pytest.mark.parametrize("generator", [None, 7])
    @pytest.mark.parametrize(("steps", "epochs"), [(None, 1), (None, 3), (1, 1), (2, 5), (3, 1), (7, 1)])
    @pytest.mark.parametrize("batch_size", [1, 2, 5, 9, None])
    def test_batches(self, batch_size: int | None, steps: int | None, epochs: int, generator: int | None) -> None:
        count, made = 5, Clients((torch.arange(9), -torch.arange(9)), [[8], [2, 3, 4, 5, 6]])
        drawn = None if generator is None else torch.Generator().manual_seed(generator)
        found = list(made.batches(1, batch_size, steps=steps, epochs=epochs, generator=drawn))
        size, again = batch_size or count, None if generator is None else torch.Generator().manual_seed(generator)
        expected: list[list[int]] = []
        wanted = epochs * -(-count // size) if steps is None else steps
        while len(expected) < wanted:
            order = list(range(count)) if again is None else torch.randperm(count, generator=again).tolist()
            expected += [[2 + at for at in order[first : first + size]] for first in range(0, count, size)]
        assert [batch[0].tolist() for batch in found] == expected[:wanted]
        assert all(torch.equal(x, -y) for x, y in found)

    def test_many_shuffled_batches(self) -> None:
        made = Clients((torch.arange(100),), [list(range(3, 98))])
        (found,) = zip(*made.batches(0, 3, steps=None, epochs=1, generator=torch.Generator()), strict=True)
        assert [len(batch) for batch in found] == [3] * 31 + [2]
        assert sorted(torch.cat(found).tolist()) == list(range(3, 98))

    def test_client_without_examples_has_no_batches(self) -> None:
        made = Clients((torch.arange(2.0),), [[], [0, 1]])
        assert list(made.batches(0, 4, steps=3, epochs=1, generator=None)) == []
        assert list(made.batches(0, None, steps=None, epochs=2, generator=torch.Generator())) == []

    @pytest.mark.parametrize(
        ("tensors", "partition", "error"),
        [
            ((torch.ones(2), torch.ones(3)), [[0]], r"Clients: expected tensors of equal length, got \[2, 3\]"),
            ((torch.ones(2),), [], "Clients: expected at least one client, got none"),
            ((torch.ones(2),), [[0, 2]], "Clients: expected row numbers from 0 to 1, got others"),
            ((torch.ones(2),), [[-1]], "Clients: expected row numbers from 0 to 1, got others"),
        ],
    )
    def test_errors(self, tensors: Any, partition: Any, error: str) -> None:
        with pytest.raises(ValueError, match=error):
            Clients(tensors, partition)


class TestFlatModel:
    """One vector, many views."""

    def test_parameters_are_views(self) -> None:
        module = mlp()
        before = torch.cat([parameter.detach().flatten() for parameter in module.parameters()])
        model = FlatModel(module)
        assert torch.equal(model.vector, before)
        x, _ = rows()
        model.vector.mul_(2)
        assert torch.equal(module[0].weight, 2 * before[:12].view(3, 4))  # type: ignore[index, arg-type]
        reference = mlp()
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(2)
        assert torch.equal(module(x), reference(x))
        module[2].bias.data.fill_(7.0)  # type: ignore[index, union-attr, operator]
        assert model.vector[-2:].tolist() == [7.0, 7.0]

    def test_views_have_the_shapes_of_parameters(self) -> None:
        model = FlatModel(mlp())
        assert [view.shape for view in model.views(torch.zeros(model.numel))] == [p.shape for p in model.parameters]

    def test_shared_parameters_once_and_frozen_ones_not(self) -> None:
        module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        module[1].weight = module[0].weight
        module[1].bias.requires_grad_(False)
        model = FlatModel(module)
        assert (model.numel, model.names) == (12, ["0.weight", "0.bias"])
        model.vector.zero_()
        assert not module[1].weight.any()  # type: ignore[operator, union-attr]

    def test_gradients(self) -> None:
        model = FlatModel(mlp())
        x, y = rows()
        mse(model.module, x, y).backward()  # type: ignore[no-untyped-call]
        expected = torch.cat([p.grad.flatten() for p in model.parameters if p.grad is not None])
        total = torch.ones_like(model.vector)
        model.parameters[1].grad = None
        model.add_grad(model.views(total), alpha=2.0)
        expected[12:15] = 0
        torch.testing.assert_close(total, 1 + 2 * expected, rtol=0, atol=0)
        model.clear_grad()
        model.add_grad(model.views(total))
        torch.testing.assert_close(total, 1 + 2 * expected, rtol=0, atol=0)

    def test_errors(self) -> None:
        with pytest.raises(ValueError, match="FlatModel: expected a module with trainable parameters, got none"):
            FlatModel(nn.ReLU())
        with pytest.raises(
            ValueError, match=r"one dtype and device, got torch.float32 .*torch.float64 on cpu \(1.weight"
        ):
            FlatModel(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double()))
        with pytest.raises(
            TypeError, match=r"FlatModel: expected real floating-point parameters, got torch[.]complex64"
        ):
            FlatModel(nn.Linear(1, 1, dtype=torch.complex64))


def by_hand(
    start: Tensor,
    batches: Iterator[tuple[Tensor, ...]],
    lr: float,
    *,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    max_norm: float | None = None,
    correction: Tensor | None = None,
    proximal: float = 0.0,
) -> tuple[Tensor, Tensor, list[float]]:
    """y, the sum of clipped gradients, and losses: with gradients of a functional form, on plain vectors."""
    y, m, total, losses = start.clone(), torch.zeros_like(start), torch.zeros_like(start), []
    for x, target in batches:
        leaf = y.clone().requires_grad_()
        w1, b1, w2, b2 = leaf.split([12, 3, 6, 2])
        out = (x @ w1.view(3, 4).T + b1).tanh() @ w2.view(2, 3).T + b2
        loss = (out - target).square().sum() / out.numel()
        (g,) = torch.autograd.grad(loss, leaf)
        if max_norm is not None and g.norm() > max_norm:
            g = g * (max_norm / (g.norm() + 1e-6))
        total += g
        g = g + proximal * (y - start) + weight_decay * y
        if correction is not None:
            g = g + correction
        m = momentum * m + g
        y = y - lr * m
        losses.append(float(loss.detach()))
    return y, total, losses


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "weight decay": {"weight_decay": 0.3},
    "clip": {"max_norm": 0.2},
    "proximal": {"proximal": 0.7},
    "correction": {"correction": torch.linspace(-1, 1, 23, dtype=torch.float64)},
    "all": {
        "momentum": 0.5,
        "weight_decay": 0.1,
        "max_norm": 0.4,
        "proximal": 0.7,
        "correction": torch.linspace(-1, 1, 23, dtype=torch.float64),
    },
}


class TestLocalTrainer:
    """Against `by_hand`, whose gradients come from vectors."""

    @pytest.mark.parametrize("name", OPTIONS)
    @pytest.mark.parametrize("epochs", [1, 3])
    def test_terms(self, name: str, epochs: int) -> None:
        options = OPTIONS[name]
        terms = {key: options[key] for key in ("correction", "proximal") if key in options}
        made = {key: value for key, value in options.items() if key not in terms}
        model, everyone = FlatModel(mlp()), clients()
        trainer = LocalTrainer(model, mse, LocalTraining(lr=0.1, batch_size=4, **made))
        start = model.vector.clone()
        total = torch.full_like(start, 9.0)
        for client in (2, 4, 2):  # nothing is left over from one client to the next

            def batches(client: int = client) -> Iterator[tuple[Tensor, ...]]:
                return everyone.batches(client, 4, steps=None, epochs=epochs, generator=torch.Generator())

            steps, loss = trainer.run(start, batches(), 0.1, total_gradient=total, **terms)
            y, sums, losses = by_hand(start, batches(), 0.1, **options)
            torch.testing.assert_close(model.vector, y, rtol=1e-13, atol=1e-14)
            torch.testing.assert_close(total, sums, rtol=1e-13, atol=1e-14)
            assert (steps, loss) == (len(losses), pytest.approx(sum(losses) / len(losses), rel=1e-13))
            assert all(parameter.grad is None for parameter in model.parameters)

    def test_gradient_at(self) -> None:
        model, everyone = FlatModel(mlp()), clients()
        start = model.vector.clone()
        trainer = LocalTrainer(model, mse, LocalTraining(lr=0.1, momentum=0.9))
        out = torch.empty_like(start)
        trainer.gradient_at(start, everyone.batches(4, 5, steps=None, epochs=1, generator=None), out)
        _, whole, _ = by_hand(start, everyone.batches(4, None, steps=1, epochs=1, generator=None), 0.1)
        torch.testing.assert_close(out, whole, rtol=1e-13, atol=1e-15)
        assert torch.equal(model.vector, start)

    def test_optimizer_starts_anew_with_the_lr_of_the_round(self) -> None:
        def adam(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.Adam(parameters, lr=99.0, betas=(0.8, 0.9))

        model, everyone = FlatModel(mlp()), clients()
        start, correction = model.vector.clone(), torch.linspace(-1, 1, 23, dtype=torch.float64)
        trainer = LocalTrainer(model, mse, LocalTraining(lr=0.1, optimizer=adam))
        for client, lr in ((2, 0.1), (4, 0.05)):
            batches = list(everyone.batches(client, 4, steps=None, epochs=2, generator=None))
            trainer.run(start, batches, lr, correction=correction, proximal=0.3)
            module = mlp()
            optimizer = torch.optim.Adam(module.parameters(), lr=lr, betas=(0.8, 0.9))
            for x, y in batches:
                flat = nn.utils.parameters_to_vector(module.parameters())
                terms = (correction * flat).sum() + 0.15 * (flat - start).square().sum()
                optimizer.zero_grad()
                (mse(module, x, y) + terms).backward()
                optimizer.step()
            expected = nn.utils.parameters_to_vector(module.parameters()).detach()
            torch.testing.assert_close(model.vector, expected, rtol=1e-12, atol=1e-13)

    def test_client_without_batches_stays_at_its_start(self) -> None:
        model = FlatModel(mlp())
        start = torch.linspace(0, 1, 23, dtype=torch.float64)
        trainer = LocalTrainer(model, mse, LocalTraining(lr=0.1, momentum=0.5))
        total = torch.ones_like(start)
        assert trainer.run(start, [], 0.1, proximal=1.0, total_gradient=total) == (0, 0.0)
        assert torch.equal(model.vector, start)
        assert not total.any()

    def test_frozen_parameters_and_those_without_a_gradient_stay(self) -> None:
        module = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2)).double()
        module[0].bias.requires_grad_(False)
        model = FlatModel(module)
        frozen, start = module[0].bias.clone(), model.vector.clone()

        def first_only(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return nn.functional.mse_loss(module[0](x), y)  # type: ignore[index, operator]

        for made in (LocalTraining(lr=0.1), LocalTraining(lr=0.1, momentum=0.5)):
            trainer = LocalTrainer(model, first_only, made)
            trainer.run(start, [rows()], 0.1)
            assert torch.equal(module[0].bias, frozen)
            assert torch.equal(model.vector[8:], start[8:])
            assert not torch.equal(model.vector[:8], start[:8])

    def test_tied_weights_get_both_gradients(self) -> None:
        module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
        module[2].weight = module[0].weight
        model, (x, _) = FlatModel(module), rows()
        start = model.vector.clone()
        LocalTrainer(model, lambda m, x: m(x).square().mean(), LocalTraining(lr=0.1)).run(start, [(x,)], 0.1)
        weight = start.view(4, 4).clone().requires_grad_()
        ((x @ weight.T).tanh() @ weight.T).square().mean().backward()  # type: ignore[no-untyped-call]
        assert weight.grad is not None
        torch.testing.assert_close(model.vector, start - 0.1 * weight.grad.flatten(), rtol=1e-13, atol=1e-14)

    def test_loss_of_another_dtype(self) -> None:
        model = FlatModel(mlp())
        start = model.vector.clone()
        trainer = LocalTrainer(model, lambda m, x, y: mse(m, x, y).float(), LocalTraining(lr=0.1))
        trainer.run(start, [rows()], 0.1)
        expected, *_ = by_hand(start, iter([rows()]), 0.1)
        torch.testing.assert_close(model.vector, expected, rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        "options",
        [
            {"lr": 0.0},
            {"lr": -1.0},
            {"lr": 0.1, "epochs": 0},
            {"lr": 0.1, "steps": 0},
            {"lr": 0.1, "batch_size": 0},
            {"lr": 0.1, "max_norm": 0.0},
            {"lr": 0.1, "momentum": 1.0},
            {"lr": 0.1, "weight_decay": -0.1},
            {"lr": 0.1, "momentum": 0.9, "optimizer": torch.optim.Adam},
        ],
    )
    def test_errors(self, options: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=r"LocalTraining: expected .*, got "):
            LocalTraining(**options)


class TestSimulation:
    """Rounds against rounds written out; seeds; what must not be touched."""

    @pytest.mark.parametrize("steps", [None, lambda round, client: (round + client) % 3])
    def test_rounds_by_hand(self, steps: Callable[[int, int], int] | None) -> None:
        training = LocalTraining(
            lr=lambda round: 0.1 / (round + 1), batch_size=4, steps=steps, shuffle=False, momentum=0.5
        )
        made = simulation(training=training, cohort_size=4, server_lr=0.7, vectorize=False)
        x, everyone = made.server.vector.clone(), clients()
        for round in range(4):
            record, cohort = made.step(), made.cohort(round)
            lr, found, weights, losses = 0.1 / (round + 1), torch.zeros_like(x), 0.0, 0.0
            for client in cohort:
                count = None if steps is None else steps(round, client)
                if count == 0:
                    continue
                batches = everyone.batches(client, 4, steps=count, epochs=1, generator=None)
                y, _, seen = by_hand(x, batches, lr, momentum=0.5)
                found += SIZES[client] * (x - y)
                weights += SIZES[client]
                losses += SIZES[client] * sum(seen) / len(seen)
            if weights:
                x = x - 0.7 * found / weights
                assert record.loss == pytest.approx(losses / weights, rel=1e-12)
            torch.testing.assert_close(made.server.vector, x, rtol=1e-13, atol=1e-14)

    def test_batches_are_drawn_by_seed_round_and_client(self) -> None:
        seen: dict[tuple[int, int, int], list[float]] = {}

        def batches(seed: int, order: slice) -> None:
            made = simulation(seed=seed, vectorize=False)
            for round in range(2):
                for client in range(len(SIZES))[order]:
                    found: list[float] = []

                    def watched(module: nn.Module, x: Tensor, y: Tensor, found: list[float] = found) -> Tensor:
                        found.extend(x[:, 0].tolist())
                        return mse(module, x, y)

                    made.runner.trainer.loss = watched
                    made.runner.run_one(client, round, made.server.vector, {})
                    key = (seed, round, client)
                    assert seen.setdefault(key, found) == found
                    assert sorted(found) == sorted(clients().examples(client)[0][:, 0].tolist())

        batches(0, slice(None))
        batches(0, slice(None, None, -1))
        batches(1, slice(None))
        assert len({tuple(value) for (seed, round, client), value in seen.items() if client == 4}) == 4

    @pytest.mark.parametrize("algorithm", [FedAvg(), SCAFFOLD(), FedProx(0.3)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_does_not_depend_on_the_numbering_of_a_cohort(self, algorithm: Any, dtype: torch.dtype) -> None:
        def result(order: int) -> Tensor:
            module, (x, y) = mlp().to(dtype), rows()
            everyone = Clients((x.to(dtype), y.to(dtype)), list(torch.arange(sum(SIZES)).split(SIZES)))
            made = simulation(module, clients=everyone, algorithm=algorithm, vectorize=False)
            draw = made.cohort
            made.cohort = lambda round: draw(round)[::order]  # type: ignore[method-assign]
            list(made.run(3))
            return made.server.vector

        tolerance = 0.0 if dtype == torch.float32 else 1e-15
        torch.testing.assert_close(result(1), result(-1), rtol=tolerance, atol=tolerance)

    def test_random_layers_are_drawn_by_seed_and_the_global_generator_is_left_alone(self) -> None:
        class Noisy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner, self.dropout = mlp(), nn.Dropout(0.5)

            def forward(self, x: Tensor) -> Tensor:
                result: Tensor = self.inner(self.dropout(x))
                return result

        def result(burn: int, seed: int = 0) -> Tensor:
            made = simulation(Noisy(), seed=seed)
            torch.manual_seed(burn)
            before = torch.get_rng_state()
            list(made.run(2))
            assert torch.equal(torch.get_rng_state(), before)
            return made.server.vector

        assert torch.equal(result(0), result(99))
        assert not torch.equal(result(0), result(0, seed=1))

    def test_cohorts(self) -> None:
        made = simulation(cohort_size=3)
        drawn = [made.cohort(round) for round in range(40)]
        assert all(cohort == sorted(set(cohort)) and len(cohort) == 3 for cohort in drawn)
        assert {client for cohort in drawn for client in cohort} == set(range(len(SIZES)))
        assert [simulation(cohort_size=3).cohort(round) for round in range(40)] == drawn
        assert [simulation(cohort_size=3, seed=1).cohort(round) for round in range(40)] != drawn

    def test_client_without_examples_takes_no_part(self) -> None:
        x, y = rows(4)
        made = simulation(clients=Clients((x, y), [[], [0, 1], [2, 3]]), algorithm=SCAFFOLD())
        record = made.step()
        assert record.participants == 2
        assert made.store.touched == [1, 2]

    def test_message_that_is_not_finite_is_dropped_whichever_round_it_comes_in(self) -> None:
        def fails_late(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return mse(module, x, y) * (float("inf") if made.rounds == 1 and x.shape[0] == 12 else 1.0)

        training = LocalTraining(lr=0.1, batch_size=None)
        made = simulation(loss=fails_late, training=training, algorithm=SCAFFOLD(), vectorize=False)
        records, kept = [], []
        for _ in range(3):
            records.append(made.step())
            kept.append({name: value.clone() for name, value in made.store.get(4).items()})
        assert [record.not_finite for record in records] == [0, 1, 0]
        assert [record.participants for record in records] == [6, 5, 6]
        assert bool(torch.isfinite(made.server.vector).all())
        assert kept[0].keys() == kept[1].keys()
        for name, value in kept[0].items():
            assert torch.equal(kept[1][name], value)
            assert not torch.equal(kept[2][name], value)


def test_mean_of_equal_messages_in_any_order_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    messages = torch.randn(50, 100, generator=generator)
    weights = torch.randint(1, 100, (50,), generator=generator).tolist()
    results = []
    for order in (range(50), torch.randperm(50, generator=generator).tolist()):
        mean = WeightedMean()
        mean.reset(100, torch.float32, torch.device("cpu"))
        for at in order:
            mean.add(messages[at], float(weights[at]))
        assert mean.sums[-1] == sum(weights)
        assert mean.sums[-1] == sum(weights)
        results.append(mean.result())
    assert torch.equal(results[0], results[1])
    expected = (messages.double() * torch.tensor(weights).double()[:, None]).sum(0) / sum(weights)
    torch.testing.assert_close(results[0], expected.float(), rtol=1e-6, atol=0)
