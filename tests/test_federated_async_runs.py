"""Asynchronous training against synchronous training; what goes wrong; what is kept."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from async_points import Point, path, points
from torch import nn

from gradwire.comm import EF, EF21
from gradwire.comm.errors import CheckpointError
from gradwire.compression import TopK
from gradwire.federated import (
    SCAFFOLD,
    Algorithm,
    AsyncFedAvg,
    AsyncPolicy,
    AsyncSimulation,
    Clients,
    ClientTimes,
    ClientTrace,
    ExponentialTimes,
    FedAsync,
    FedAvg,
    FedBuff,
    FedFix,
    FedNova,
    FedProx,
    FixedTimes,
    Link,
    LocalTraining,
    Recalibrate,
    Simulation,
    TraceTimes,
)

# Against synchronous training, of a small model in its own dtype.


def data(dtype: torch.dtype = torch.float32) -> Clients:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 6, generator=generator, dtype=dtype)
    targets = inputs @ torch.randn(6, 2, generator=generator, dtype=dtype)
    return Clients((inputs, targets), [range(5), range(5, 25), range(25, 40), range(40, 47), range(47, 60), [3, 4]])


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Dropout(0.1), nn.Linear(5, 2)).to(dtype)


def fit(module: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(module(inputs), targets)


TRAINING = LocalTraining(lr=lambda round: 0.1 / (1 + 0.1 * round), epochs=2, batch_size=4)


def both(policy: AsyncPolicy, algorithm: Algorithm, size: int, **options: Any) -> tuple[AsyncSimulation, Simulation]:
    """The same asynchronously and in rounds."""
    asynchronous = AsyncSimulation(
        network(), data(), algorithm, TRAINING, loss=fit, policy=policy, concurrency=size,
        times=FixedTimes([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), **options,
    )  # fmt: skip
    rounds = Simulation(network(), data(), algorithm, TRAINING, loss=fit, cohort_size=size, **options)
    return asynchronous, rounds


UPLINK = Link(TopK(ratio=0.3), EF())


@pytest.mark.parametrize("options", [{}, {"uplink": UPLINK}, {"server_lr": 0.7}], ids=["plain", "EF", "server_lr"])
def test_intervals_as_long_as_the_slowest_client_are_rounds(options: dict[str, Any]) -> None:
    asynchronous, rounds = both(FedFix(6.0), FedAvg(), 6, **options)
    for record, other in zip(asynchronous.run(5), rounds.run(5), strict=True):
        assert torch.equal(asynchronous.server.vector, rounds.server.vector)
        assert (record.bytes_up, record.bytes_down, record.participants) == (other.bytes_up, other.bytes_down, 6)
        assert (record.time, record.staleness) == (6.0 * record.round, 0.0)
        assert record.loss == pytest.approx(other.loss)


@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("options", [{}, {"uplink": UPLINK}], ids=["plain", "EF"])
def test_open_slots_buffer_and_concurrency_alike_are_rounds(size: int, options: dict[str, Any]) -> None:
    policy = FedBuff(size, open_slots=size)
    for own in (policy, replace(policy, staleness="constant"), replace(policy, weights="identical")):
        asynchronous, rounds = both(own, FedProx(mu=0.1, weighting="uniform"), size, **options)
        for record, other in zip(asynchronous.run(5), rounds.run(5), strict=True):
            torch.testing.assert_close(asynchronous.server.vector, rounds.server.vector, rtol=0, atol=1e-6)
            assert (record.bytes_up, record.bytes_down, record.participants) == (other.bytes_up, other.bytes_down, size)


def test_one_client_at_a_time_is_sequential() -> None:
    for policy in (FedBuff(1, staleness="constant", weights="identical"), AsyncFedAvg(), FedAsync(alpha=1.0)):
        asynchronous, rounds = both(policy, FedAvg(weighting="uniform"), 1)
        list(asynchronous.run(8))
        list(rounds.run(8))
        torch.testing.assert_close(asynchronous.server.vector, rounds.server.vector, rtol=0, atol=1e-6)


def test_short_intervals_are_asynchronous() -> None:
    times = FixedTimes([1.0, 2.1013, 3.3177, 6.7391])
    steps = points(AsyncFedAvg(), times, lr=0.1), points(FedFix(1e-6), times, lr=0.1)
    np.testing.assert_allclose(path(steps[0], 60), path(steps[1], 60), rtol=1e-5)


def test_intervals_are_not_late_by_rounding() -> None:
    made = points(FedFix(0.1), FixedTimes([0.1, 0.2, 0.3, 0.7]))
    for record in made.run(300):
        number = record.round
        assert record.participants == sum(number % each == 0 for each in (1, 2, 3, 7))
    assert made.time == 30.0


# What goes wrong, and what is left when it does.


def test_lost_stale_broken_and_failing_clients_are_counted_and_leave_no_trace() -> None:
    made = points(AsyncFedAvg(), dropout=0.4, seed=3)
    records = list(made.run(100))
    lost = sum(record.lost for record in records)
    assert 0.3 < lost / (lost + 100) < 0.5
    late = points(FedAsync(max_staleness=3, weights="identical"), lr=0.1)
    records = list(late.run(60))
    assert max(record.staleness for record in records) <= 3
    assert sum(record.late for record in records) > 5
    broken = points(AsyncFedAvg(weights="identical"), b=(0.0, float("nan"), 1.0, 2.0), start=1.0)
    records = list(broken.run(40))
    assert sum(record.not_finite for record in records) > 5
    assert np.isfinite(broken.module.x.item())
    assert all(record.participants == 1 for record in records)


def _fails(module: nn.Module, target: torch.Tensor) -> torch.Tensor:
    if target.item() == 10.0:
        raise RuntimeError("no more memory")
    return ((module.x - target) ** 2).sum() / 2


def test_errors_stop_the_run_or_are_reported() -> None:
    made = points(FedFix(6.0), on_error="skip")
    made.runner.trainer.loss = _fails
    record = made.step()
    assert record.participants == 3
    assert record.failures == {3: "RuntimeError: no more memory"}
    made = points(FedFix(6.0))
    made.runner.trainer.loss = _fails
    with pytest.raises(RuntimeError, match="no more memory"):
        made.step()


@pytest.mark.parametrize("policy", [AsyncFedAvg(), FedBuff(3), FedFix(2.0)])
def test_a_run_in_which_all_fail_goes_on(policy: AsyncPolicy) -> None:
    made = points(policy, b=(float("nan"),) * 4, start=1.0)
    records = list(made.run(3))
    assert made.module.x.item() == 1.0
    assert [record.participants for record in records] == [0, 0, 0]
    assert all(record.not_finite for record in records)


def test_versions_are_kept_no_longer_than_clients_work_with_them() -> None:
    made = points(AsyncFedAvg(), ExponentialTimes(1.0), p=(1.0,) * 40, b=(0.0,) * 40, concurrency=8)
    most = 0
    for _ in made.run(200):
        versions = {flight.version for flight in made.dispatcher.clock.flights}
        assert made.dispatcher.versions_in_flight == len(versions)
        most = max(most, len(versions))
    assert 4 < most <= 8
    buffered = points(FedBuff(8, open_slots=8), ExponentialTimes(1.0), p=(1.0,) * 40, b=(0.0,) * 40, concurrency=8)
    assert [buffered.dispatcher.versions_in_flight for _ in buffered.run(5)] == [0] * 5


TRACE = TraceTimes(
    [ClientTrace(0.1 * (client + 1), 1e3, 1e3, ((client, client + 4.0),)) for client in range(6)], period=15.0
)


def resumable(policy: AsyncPolicy, times: ClientTimes, store: Path | None = None) -> AsyncSimulation:
    return AsyncSimulation(
        network(), data(), FedAvg(), TRAINING, loss=fit, policy=policy, times=times, concurrency=4, uplink=UPLINK,
        server_optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.05), dropout=0.1, seed=7, store=store,
    )  # fmt: skip


@pytest.mark.parametrize("times", [ExponentialTimes(1.0), TRACE], ids=["exponential", "trace"])
@pytest.mark.parametrize(
    "policy", [AsyncFedAvg(), FedBuff(3, open_slots=2), FedFix(0.7)], ids=lambda p: type(p).__name__
)
def test_a_resumed_run_equals_the_uninterrupted_one(policy: AsyncPolicy, times: ClientTimes, tmp_path: Path) -> None:
    state = torch.default_generator.get_state()
    whole = resumable(policy, times)
    records = list(whole.run(24))
    assert not torch.equal(whole.server.vector, resumable(policy, times).server.vector)
    store = tmp_path / "store" if isinstance(policy, FedBuff) else None
    first = resumable(policy, times, store)
    list(first.run(11))
    first.save(tmp_path / "saved", extra={"rounds": 11})
    list(first.run(2))  # goes on and is lost
    resumed = resumable(policy, times, store)
    assert resumed.load(tmp_path / "saved") == {"rounds": 11}
    assert repr(list(resumed.run(13))) == repr(records[11:])  # losses may be NaN
    assert torch.equal(resumed.server.vector, whole.server.vector)
    assert torch.equal(resumed.module[0].weight, whole.module[0].weight)
    torch.manual_seed(0)
    copied = resumable(policy, times)
    copied.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert copied.state_dict()["dispatcher"]["clock"] == whole.state_dict()["dispatcher"]["clock"]
    torch.default_generator.set_state(state)


def test_a_checkpoint_of_other_arguments_is_refused(tmp_path: Path) -> None:
    made = resumable(FedBuff(3), TRACE)
    list(made.run(2))
    made.save(tmp_path / "saved")
    other = TraceTimes([replace(TRACE.clients[0], seconds_per_example=1.0), *TRACE.clients[1:]], period=15.0)
    for policy, times, name in ((FedBuff(4), TRACE, r"policy\.buffer=3"), (FedBuff(3), other, "times=TraceTimes")):
        with pytest.raises(CheckpointError, match=name):
            resumable(policy, times).load(tmp_path / "saved")


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    made = resumable(AsyncFedAvg(), ExponentialTimes(1.0))
    torch.manual_seed(5)
    list(made.run(3))
    assert torch.equal(torch.rand(3), expected)


def test_clients_begin_when_they_are_available() -> None:
    traces = [ClientTrace(1.0, available=((0.0, 3.0),)), ClientTrace(1.0, available=((5.0, 9.0),))]
    made = points(
        AsyncFedAvg(weights="identical"), TraceTimes(traces, period=10.0), p=(1.0, 1.0), b=(0.0, 1.0), concurrency=1
    )
    assert [record.time for record in made.run(9)] == [1, 2, 3, 6, 7, 8, 9, 11, 12]


def test_clients_without_examples_are_never_sent_a_model() -> None:
    rows = torch.ones(2, 1, dtype=torch.float64)
    made = AsyncSimulation(
        Point(0.0), Clients((rows,), [[0], [], [1]]), FedAvg(), LocalTraining(lr=0.1), policy=FedFix(1.0),
        loss=lambda module, b: ((module.x - b) ** 2).sum() / 2, times=FixedTimes([1.0, 1.0, 1.0]),
    )  # fmt: skip
    assert [record.participants for record in made.run(3)] == [2, 2, 2]
    assert made.module.x.item() == pytest.approx(1 - 0.9**3)


def test_what_does_not_fit_is_refused() -> None:
    for algorithm in (SCAFFOLD(), FedNova()):
        with pytest.raises(ValueError, match="AsyncSimulation: expected an algorithm whose clients send"):
            points(AsyncFedAvg(), algorithm=algorithm)
    with pytest.raises(ValueError, match="expected feedback whose state lies with the client"):
        points(AsyncFedAvg(), uplink=Link(TopK(ratio=0.5), EF21()))
    with pytest.raises(ValueError, match="expected 1 <= concurrency <= 4"):
        points(AsyncFedAvg(), concurrency=5)
    with pytest.raises(ValueError, match="expected open_slots <= concurrency=2, got open_slots=3"):
        points(FedBuff(3, open_slots=3), concurrency=2)
    with pytest.raises(ValueError, match="expected seconds for 4 clients"):
        points(AsyncFedAvg(), FixedTimes([1.0]))
    for make, message in (
        (lambda: FedBuff(0), "FedBuff: expected buffer >= 1"),
        (lambda: FedBuff(open_slots=0), "FedBuff: expected open_slots >= 1"),
        (lambda: FedFix(0.0), "FedFix: expected a finite interval > 0"),
        (lambda: FedAsync(alpha=0.0), "FedAsync: expected 0 < alpha <= 1"),
        (lambda: FedAsync(staleness="quadratic"), "FedAsync: expected staleness constant, polynomial"),
        (lambda: FedAsync(max_staleness=-1), "FedAsync: expected max_staleness >= 0"),
        (lambda: FedAsync(delta_from="next"), "FedAsync: expected delta_from sent or current"),
        (lambda: AsyncFedAvg(weights="right"), "AsyncFedAvg: expected weights auto"),
    ):
        with pytest.raises(ValueError, match=message):
            make()  # type: ignore[no-untyped-call]


def test_a_client_that_gets_a_version_twice_draws_other_batches() -> None:
    seen: list[float] = []

    def told(module: nn.Module, row: torch.Tensor) -> torch.Tensor:
        seen.append(row.sum().item())
        return (module.x * row).sum()

    made = AsyncSimulation(
        Point(), Clients((torch.arange(100.0, dtype=torch.float64)[:, None],), [range(100)]), FedAvg(),
        LocalTraining(lr=0.1, steps=1, batch_size=1), loss=told, policy=FedBuff(8), times=FixedTimes(1.0),
    )  # fmt: skip
    made.step()
    assert len(seen) == 8
    assert len(set(seen)) > 4


def test_a_buffer_waits_for_messages_that_are_not_lost() -> None:
    made = points(FedBuff(4), dropout=0.8, concurrency=1, seed=1)
    records = list(made.run(5))
    assert [record.participants for record in records] == [4] * 5
    assert sum(record.lost for record in records) > 20


def test_buffers_are_the_servers() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(20, 6) + 3.0,)]
    for policy in ("server", Recalibrate(batches)):
        module = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))
        made = AsyncSimulation(
            module, data(), FedAvg(), LocalTraining(lr=0.1, batch_size=None), loss=fit, policy=FedBuff(2),
            times=FixedTimes(1.0), buffers=policy,
        )  # fmt: skip
        list(made.run(3))
        expected = torch.zeros(6) if policy == "server" else batches[0][0].mean(0)
        torch.testing.assert_close(module[0].running_mean, expected)
    with pytest.raises(ValueError, match='expected buffers="server" or Recalibrate'):
        points(AsyncFedAvg(), buffers="mean")
