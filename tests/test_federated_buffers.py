"""What becomes of buffers, against statistics computed by hand; and the compressed downlink."""

import copy
from typing import Any

import federated_runs as runs
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gradwire.comm.feedback import EF
from gradwire.compression import QSGD, Identity, Scaled, TopK
from gradwire.federated import (
    SCAFFOLD,
    Buffers,
    Clients,
    Downlink,
    FedAdam,
    FedAvg,
    Link,
    LocalTraining,
    Recalibrate,
    Simulation,
)

SIZES = (2, 6, 4)


def _clients() -> Clients:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(SIZES), 2, generator=generator, dtype=torch.float64) * 3 + 5
    return Clients((x,), torch.split(torch.arange(sum(SIZES)), list(SIZES)))


class Norm(nn.Module):
    """BatchNorm whose parameters do not move, so that its statistics can be told in advance."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2, dtype=torch.float64)
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("table", torch.arange(3))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def _loss(module: nn.Module, x: Tensor) -> Tensor:
    return module(x).square().sum() * 0.0


def _simulation(clients: Clients | None = None, **other: Any) -> Simulation:
    training = LocalTraining(lr=0.1, batch_size=None, steps=other.pop("steps", 3))
    algorithm = other.pop("algorithm", FedAvg())
    return Simulation(Norm(), clients or _clients(), algorithm, training, loss=_loss, **other)


def _statistics(start: tuple[Any, Any], x: Any, steps: int) -> tuple[Any, Any]:
    """Running mean and variance after so many batches of all of x."""
    mean, variance = start
    for _ in range(steps):
        mean = 0.9 * mean + 0.1 * x.mean(0)
        variance = 0.9 * variance + 0.1 * x.var(0, ddof=1)
    return mean, variance


def _parts() -> list[Any]:
    clients = _clients()
    return [clients.examples(i)[0].numpy() for i in range(len(SIZES))]


def _norm(simulation: Simulation) -> nn.BatchNorm1d:
    norm = simulation.module.norm
    assert isinstance(norm, nn.BatchNorm1d)
    return norm


def test_mean_takes_weighted_means_of_numbers_and_the_greatest_counter() -> None:
    simulation = _simulation(steps=None)
    simulation.runner.trainer.training = LocalTraining(lr=0.1, batch_size=None, steps=lambda round, client: client + 1)
    mean, variance = np.zeros(2), np.ones(2)
    weights = np.array(SIZES)[:, None] / sum(SIZES)
    for round in range(3):
        simulation.step()
        found = [_statistics((mean, variance), x, client + 1) for client, x in enumerate(_parts())]
        mean, variance = (sum(w * f[i] for w, f in zip(weights, found, strict=True)) for i in (0, 1))
        np.testing.assert_allclose(_norm(simulation).running_mean.numpy(), mean, rtol=1e-13)
        np.testing.assert_allclose(_norm(simulation).running_var.numpy(), variance, rtol=1e-13)
        assert int(_norm(simulation).num_batches_tracked) == 3 * (round + 1)
    assert _norm(simulation).num_batches_tracked.dtype == torch.int64


def test_pooled_is_the_variance_of_all_examples_together() -> None:
    simulation = _simulation(steps=4, buffers="pooled")
    mean, variance = np.zeros(2), np.ones(2)
    weights = np.array(SIZES)[:, None] / sum(SIZES)
    for _ in range(3):
        simulation.step()
        found = [_statistics((mean, variance), x, 4) for x in _parts()]
        mean = sum(w * m for w, (m, _) in zip(weights, found, strict=True))
        square = sum(w * (v + m * m) for w, (m, v) in zip(weights, found, strict=True))
        variance = square - mean * mean
        np.testing.assert_allclose(_norm(simulation).running_mean.numpy(), mean, rtol=1e-12)
        np.testing.assert_allclose(_norm(simulation).running_var.numpy(), variance, rtol=1e-12)


def test_pooled_variances_are_never_negative() -> None:
    """Far from zero, squares lose all digits of the variance; they are taken around the server's mean."""
    x = torch.full((12, 2), 1e9, dtype=torch.float64) + torch.arange(24.0).view(12, 2) * 1e-3
    simulation = _simulation(Clients((x,), torch.split(torch.arange(12), list(SIZES))), buffers="pooled", steps=400)
    list(simulation.run(2))
    assert (_norm(simulation).running_var >= 0).all()
    buffers = Buffers(nn.BatchNorm1d(1), "pooled")
    buffers.settle(torch.tensor([3.0, 1.0], dtype=torch.float64), [1], 0, 0)
    assert float(buffers.tensors[1]) == 0.0


@pytest.mark.parametrize("policy", ["mean", "pooled"])
def test_the_order_of_clients_does_not_matter(policy: Any) -> None:
    """The first client's statistics are no one's but its own."""
    parts = _parts()
    found = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        x = torch.from_numpy(np.concatenate([parts[i] for i in order]))
        rows = torch.split(torch.arange(12), [SIZES[i] for i in order])
        simulation = _simulation(Clients((x,), rows), buffers=policy)
        list(simulation.run(2))
        found.append(torch.cat([_norm(simulation).running_mean, _norm(simulation).running_var]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-13, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-13, atol=0)


def test_server_keeps_what_it_had_at_first() -> None:
    simulation = _simulation(buffers="server")
    before = copy.deepcopy(simulation.module.state_dict())
    record = list(simulation.run(3))[-1]
    for name, value in simulation.module.state_dict().items():
        assert torch.equal(value, before[name]) or name.endswith(("weight", "bias"))
    assert record.bytes_up == record.bytes_down == 3 * len(SIZES) * 4 * 8


def test_local_statistics_go_on_from_round_to_round_at_every_client() -> None:
    simulation = _simulation(buffers="local")
    list(simulation.run(3))
    assert torch.equal(_norm(simulation).running_mean, torch.zeros(2, dtype=torch.float64))
    for client, x in enumerate(_parts()):
        own = simulation.store.get(client)["buffers"].numpy()
        mean, variance = _statistics((np.zeros(2), np.ones(2)), x, 9)
        np.testing.assert_allclose(own, [*mean, *variance, 9, 1], rtol=1e-13)


def test_recalibrated_statistics_are_those_of_given_batches() -> None:
    batches = [(torch.randn(n, 6, generator=torch.Generator().manual_seed(n)),) for n in (5, 5, 5)]
    torch.manual_seed(0)
    module = runs.Net(norm=True, dropout=0.5)
    simulation = Simulation(
        module,
        runs.clients(),
        FedAvg(),
        LocalTraining(lr=0.5, batch_size=None),
        loss=runs.loss,
        buffers=Recalibrate(batches),
    )
    state = torch.random.get_rng_state()
    list(simulation.run(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    hidden = [module[0](x) for (x,) in batches]
    expected = torch.stack([h.mean(0) for h in hidden]).mean(0)
    torch.testing.assert_close(module[1].running_mean, expected)
    torch.testing.assert_close(module[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0))
    assert module[1].momentum == 0.1
    assert module.training
    assert all(part.training for part in module.modules())


def test_adaptive_optimizers_and_control_variates_never_touch_buffers() -> None:
    """They are averaged, neither stepped over nor corrected; the server's step has another size altogether."""
    plain, adaptive = _simulation(), _simulation(server_optimizer=lambda p: FedAdam(p, lr=10.0))
    control = _simulation(algorithm=SCAFFOLD(weighting="samples"))
    for simulation in (plain, adaptive, control):
        list(simulation.run(3))
        assert torch.equal(_norm(simulation).running_var, _norm(plain).running_var)
        assert torch.equal(_norm(simulation).running_mean, _norm(plain).running_mean)
        assert simulation.model.numel == 4


def test_other_buffers_stay_the_servers() -> None:
    simulation = _simulation()
    list(simulation.run(2))
    assert simulation.module.table.tolist() == [0, 1, 2]
    assert simulation.module.mask.tolist() == [True, False]


def test_bytes_count_buffers_both_ways() -> None:
    record = _simulation(cohort_size=2).step()
    assert record.bytes_up == record.bytes_down == 2 * (4 * 8 + 4 * 8 + 8)


def test_a_client_whose_statistics_are_not_finite_is_dropped() -> None:
    clients = _clients()
    clients.examples(1)[0][0, 0] = float("inf")
    simulation = _simulation(clients)
    simulation.runner.trainer.loss = lambda module, x: (
        (module(x).detach().nan_to_num() * module.norm.weight).sum() * 0.0
    )
    record = simulation.step()
    assert (record.not_finite, record.participants) == (1, 2)
    assert torch.isfinite(_norm(simulation).running_mean).all()


def test_policies_have_names() -> None:
    with pytest.raises(ValueError, match='expected "mean", "pooled"'):
        _simulation(buffers="average")


class TestDownlink:
    def test_the_shadow_follows_the_model_by_compressed_differences(self) -> None:
        """NumPy: w <- w + top-k(x - w), clients start from w, the server steps from x."""
        simulation = runs.make("fedavg", torch.float64, downlink=Link(TopK(ratio=0.1)), dropout=0.0)
        starts: list[Tensor] = []
        original = simulation.runner.trainer.run

        def run(start: Tensor, *args: Any, **kwargs: Any) -> Any:
            starts.append(start.clone())
            return original(start, *args, **kwargs)

        simulation.runner.trainer.run = run  # type: ignore[method-assign]
        shadow = simulation.server.vector.numpy().copy()
        count = -(-shadow.size // 10)
        for _ in range(6):
            x = simulation.server.vector.numpy().copy()
            difference = x - shadow
            largest = np.argsort(-np.abs(difference), kind="stable")[:count]
            shadow[largest] += difference[largest]
            starts.clear()
            simulation.step()
            assert starts
            for start in starts:
                np.testing.assert_allclose(start.numpy(), shadow, atol=1e-15)

    def test_a_lossless_downlink_changes_nothing(self) -> None:
        plain, linked = (
            runs.make("scaffold", torch.float64),
            runs.make("scaffold", torch.float64, downlink=Link(Identity())),
        )
        torch.testing.assert_close(
            torch.tensor([r.loss for r in plain.run(4)]),
            torch.tensor([r.loss for r in linked.run(4)]),
            rtol=1e-10,
            atol=0,
        )

    def test_bytes_are_those_of_missed_messages_or_of_the_whole_model(self) -> None:
        downlink = Downlink(Link(TopK(ratio=0.25)), torch.zeros(8), seed=0)
        generator = torch.Generator().manual_seed(0)
        sizes = []
        for round in range(8):
            before = downlink.sent
            downlink.send(torch.randn(8, generator=generator), round)
            sizes.append(downlink.sent - before)
            assert downlink.deliver([0]) == (32 if round == 0 else sizes[-1])
            if round == 2:
                assert downlink.deliver([1, 2]) == 64
            if round == 4:
                assert downlink.deliver([1]) == min(32, sum(sizes[3:5]))
        assert sizes == [sizes[0]] * 8
        assert sum(sizes[3:]) > 32
        assert downlink.deliver([2]) == 32
        assert downlink.deliver([2]) == 0

    def test_a_simulation_counts_them(self) -> None:
        simulation = runs.make("scaffold", downlink=Link(TopK(ratio=0.1)), cohort_size=runs.N)
        message = TopK(ratio=0.1).payload_bytes(torch.Size([simulation.model.numel]), torch.float32)
        records = list(simulation.run(3))
        whole = simulation.model.numel * 4
        each = [whole + whole, whole + message, whole + message]  # the control variate stays dense
        assert [r.bytes_down for r in records] == [runs.N * sum(each[: i + 1]) for i in range(3)]

    def test_it_converges_where_compression_without_memory_does_not_matter_any_more(self) -> None:
        simulation = runs.make("fedavg", downlink=Link(TopK(ratio=0.1)), dropout=0.0, cohort_size=runs.N)
        plain = runs.make("fedavg", dropout=0.0, cohort_size=runs.N)
        lossy, exact = list(simulation.run(40))[-1], list(plain.run(40))[-1]
        assert lossy.loss < 1.15 * exact.loss
        assert lossy.bytes_down < 0.35 * exact.bytes_down

    def test_what_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="without feedback"):
            runs.make("fedavg", downlink=Link(TopK(ratio=0.1), EF()))
        with pytest.raises(ValueError, match="Scaled"):
            runs.make("fedavg", downlink=Link(QSGD(levels=1)))
        runs.make("fedavg", downlink=Link(Scaled(QSGD(levels=1)))).step()
        with pytest.raises(ValueError, match="server's model exactly"):
            runs.make(
                "fedavg",
                algorithm=SCAFFOLD(form="zero overhead"),
                cohort_size=runs.N,
                dropout=0.0,
                downlink=Link(TopK(ratio=0.1)),
            )
